"""Our files, model.safetensors and ONNX, and the metadata in them."""
