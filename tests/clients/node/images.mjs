// What OpenAI's client for Node makes of the server: `node --input-type=module - URL IMAGE MASK < images.mjs`, in the directory
// in which it is installed, writes what it found to stdout, as JSON. IMAGE is the file to be edited.

import { createReadStream } from "node:fs";
import OpenAI, { toFile } from "openai";

const [url, image, mask] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "unused", maxRetries: 0 });
const prompt = "a large red circle on a blue background";
const ours = { seed: 5, num_inference_steps: 4, reproducible: true };
const file = async (path) => toFile(createReadStream(path), "file.png", { type: "image/png" });
const source = async () => file(image);

// in forms this client sends null as the text "null", and takes no other
const told = (answer) => ({
  images: answer.data.map((one) => ({ b64_json: one.b64_json ?? null, url: one.url ?? null })),
  usage: answer.usage,
  size: answer.size,
  output_format: answer.output_format,
});

async function events(stream) {
  const found = [];
  for await (const event of stream) {
    found.push({ type: event.type, size: event.size, quality: event.quality, usage: event.usage ?? null, bytes: event.b64_json.length });
  }
  return found;
}

async function failure(work) {
  try {
    await work();
  } catch (error) {
    return { name: error.constructor.name, status: error.status, code: error.code, param: error.param, message: error.message };
  }
  return null;
}

const found = {
  generation: told(await client.images.generate({ prompt, n: 2, size: "64x64", quality: null, style: null, ...ours })),
  url: told(await client.images.generate({ prompt, response_format: "url", ...ours })),
  stream: await events(await client.images.generate({ prompt, stream: true, partial_images: 2, ...ours })),
  edit: told(await client.images.edit({ image: [await source()], mask: await file(mask), prompt, quality: "null", ...ours })),
  edit_stream: await events(await client.images.edit({ image: await source(), prompt, stream: true, partial_images: 1, ...ours })),
  models: (await client.models.list()).data.map((one) => one.id),
  errors: [
    await failure(async () => client.images.generate({ prompt, n: 99 })),
    await failure(async () => client.images.generate({ prompt, model: "dall-e-3" })),
    await failure(async () => client.images.edit({ image: [await source(), await source()], prompt })),
    await failure(async () => client.images.createVariation({ image: await source() })),
  ],
};
console.log(JSON.stringify(found));
