"""The Open Inference Protocol's messages: tensors, what requests ask for, Triton's extensions."""
