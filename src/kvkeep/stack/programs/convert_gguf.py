"""Turn one GGUF file into a folder of safetensors, tokenizer and chat template: a program.

Run as ``python -m kvkeep.stack.programs.convert_gguf SOURCE TARGET``, always in a process of its
own, since it loads torch and transformers. It prints one JSON line per step begun, ``{"step",
"steps", "doing"}``, and writes only into TARGET, which must be an empty folder.
"""

import ctypes
import importlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

STEPS = (
    "loading transformers",
    "reading the tokenizer",
    "unpacking the weights",
    "writing safetensors",
)


def report(step: int) -> None:
    """Say which step begins, for the parent's progress bar."""
    print(json.dumps({"step": step, "steps": len(STEPS), "doing": STEPS[step]}), flush=True)


def declared_pre_tokenizer(source: Path) -> str:
    """Name of the rules by which the file's tokenizer splits text; empty where it names none."""
    gguf: Any = importlib.import_module("gguf")
    field = gguf.GGUFReader(str(source)).fields.get("tokenizer.ggml.pre")
    return str(field.contents()) if field is not None else ""


def mend_pre_tokenizer(tokenizer: Any, name: str) -> None:
    """Split text as the model's own tokenizer does.

    transformers 5.19 drops ``tokenizer.ggml.pre`` and always splits as GPT-2 did. SmolLM2 was
    trained with every digit on its own, so "a  1" came out as other tokens than those it learned.

    Source: llama.cpp, src/llama-vocab.cpp, LLAMA_VOCAB_PRE_TYPE_SMOLLM.
    """
    if name != "smollm":
        return
    rules: Any = importlib.import_module("tokenizers.pre_tokenizers")
    tokenizer.backend_tokenizer.pre_tokenizer = rules.Sequence(
        [
            rules.Digits(individual_digits=True),
            rules.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )


def convert(source: Path, target: Path) -> None:
    """Write the model of ``source`` in bfloat16 into the empty folder ``target``."""
    report(0)
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    place = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    report(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**place)
    mend_pre_tokenizer(tokenizer, declared_pre_tokenizer(source))
    report(2)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **place,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    report(3)
    model.save_pretrained(str(target))
    tokenizer.save_pretrained(str(target))
    tidy_tokenizer_settings(target / "tokenizer_config.json", model.config.max_position_embeddings)
    for path in target.iterdir():
        path.chmod(0o644)


def tidy_tokenizer_settings(path: Path, context_tokens: int) -> None:
    """Make the settings true for whoever opens the folder, with transformers 4 as with 5."""
    settings = json.loads(path.read_text())
    for name in ("is_local", "local_files_only", "backend"):
        settings.pop(name, None)
    settings |= {"model_max_length": context_tokens, "tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2) + "\n")


def main() -> None:
    """Convert what the command line names."""
    if len(sys.argv) != 3:
        sys.exit("usage: python -m kvkeep.stack.programs.convert_gguf SOURCE.gguf TARGET_FOLDER")
    # Whoever waits for the result may be killed; going on would write into a folder that the next
    # one takes for its own. (prctl(2): PR_SET_PDEATHSIG is 1.)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    convert(Path(sys.argv[1]), Path(sys.argv[2]))


if __name__ == "__main__":
    main()
