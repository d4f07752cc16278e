"""Write an ONNX graph for batches of any size, which onnxruntime and other runtimes run without Python."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from pathlib import Path

import torch

from mpp.exchange.artifact import Artifact

MOST_INSIDE_BYTES = 1_900_000_000
"""Most bytes of weights in the file itself, which protobuf limits to 2 GiB. Larger weights go to a second file."""
EXTRA, NEEDS = "onnx", ("onnx", "onnxscript", "onnxruntime")

USE = """
import onnxruntime

session = onnxruntime.InferenceSession("FOLDER/model.onnx")
names = [output.name for output in session.get_outputs()]
found = dict(zip(names, session.run(names, {"images": images})))  # (N, channels, H, W) float32, normalised as below
"""


def use(artifact: Artifact, folder: Path) -> str:
    return USE + artifact.reading_line()


def write(artifact: Artifact, folder: Path) -> str:
    """Write model.onnx, with the normalisation of images and the names of classes as metadata.

    Returns:
        The opset, for the model card.
    """
    import onnx

    images, model = artifact.reference["images"], copy.deepcopy(artifact.model)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            # torch's exporter cannot translate the fused attention of BEiT and Hiera
            module.fused_attn = False  # type: ignore[assignment]
    with (
        warnings.catch_warnings(action="ignore"),
        contextlib.redirect_stdout(io.StringIO()),  # the exporter prints its steps
    ):
        torch.onnx.export(
            model,
            (images,),
            str(folder / "model.onnx"),
            input_names=["images"],
            output_names=list(artifact.outputs),
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
            dynamo=True,
            external_data=sum(p.numel() * p.element_size() for p in model.parameters()) > MOST_INSIDE_BYTES,
            verbose=False,
        )
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    written = onnx.load(folder / "model.onnx", load_external_data=False)
    onnx.helper.set_model_props(written, artifact.described())
    onnx.save(written, folder / "model.onnx")
    return f"opset {max(o.version for o in written.opset_import if not o.domain)}"


VERIFY = """
import sys
import onnxruntime
from safetensors.numpy import load_file
folder = sys.argv[1]
options = onnxruntime.SessionOptions()
options.log_severity_level = 3
session = onnxruntime.InferenceSession(folder + "/model.onnx", options, providers=["CPUExecutionProvider"])
reference = load_file(folder + "/reference.safetensors")
names = [o.name for o in session.get_outputs()]
images = reference["images"]
one, three = (session.run(None, {"images": part}) for part in (images[:1], images[[1, 0, 1]]))
runs = [({k: v for k, v in zip(names, one)}, [0]), ({k: v for k, v in zip(names, three)}, [1, 0, 1])]
"""
