"""Label a picture with an exported student: `python student_onnx.py student.onnx photo.jpg labels.png`.

It needs numpy, pillow and onnxruntime, and nothing of this package.
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image

model, picture, output = sys.argv[1:]
session = onnxruntime.InferenceSession(model, providers=onnxruntime.get_available_providers())
metadata = session.get_modelmeta().custom_metadata_map
height, width = session.get_inputs()[0].shape[2:]  # numbers in a file that takes one size, else names
photo = Image.open(picture).convert("RGB")
resized = photo.resize((width, height)) if isinstance(width, int) else photo
image = np.asarray(resized, np.float32).transpose(2, 0, 1)[None] / 255
logits = session.run(["logits"], {"image": image})[0]
labels = Image.fromarray((logits[0].argmax(0) + int(metadata["first_id"])).astype(np.uint8))
labels.resize(photo.size, Image.Resampling.NEAREST).save(output)
for label, count in zip(*np.unique(labels, return_counts=True), strict=True):
    print(f"{json.loads(metadata['classes'])[label]}: {100 * count / labels.width / labels.height:.1f} %")
