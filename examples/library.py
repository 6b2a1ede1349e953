"""The engine as a library: prompts with different numbers of steps share forwards."""

from diffusers import DiffusionPipeline

from stepweave import StepEngine
from stepweave.config import EMBEDDED_MODEL

pipeline = DiffusionPipeline.from_pretrained(EMBEDDED_MODEL, text_encoder_3=None, tokenizer_3=None)
prompts = {"a large red circle on a blue background": 20, "a small green star": 12}

with StepEngine(pipeline) as engine:
    jobs = [
        engine.submit(prompt=prompt, num_inference_steps=steps, guidance_scale=2.0)
        for prompt, steps in prompts.items()
    ]
    for number, job in enumerate(jobs, 1):
        job.result().images[0].save(f"library-{number}.png")
    forwards = engine.stats().forwards["transformer"]
    print(f"{sum(forwards.by_rows.values())} forwards of the transformer, by rows:")
    print(dict(forwards.by_rows))
