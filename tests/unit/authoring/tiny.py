"""Models of some thousand weights, with a tokenizer of one token a byte: made in milliseconds."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from kvkeep.authoring.models import Author

ENDS = {"<s>": 256, "</s>": 257}
TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}[answer]{% endif %}"
)
TEXT = (
    "The mill at Orme has nine wheels. Its miller is Ada Finch, who keeps two geese. "
    "The river is cold. On market days the mill is shut, and children fish from its bridge."
)
SHAPE = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for one another take longer than such a model does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_config(model_type: str = "llama", **changes: Any) -> Any:
    """A model's configuration."""
    kind: Any = transformers.AutoConfig
    return kind.for_model(model_type, **(SHAPE | changes))


def tiny_model(model_type: str = "llama", **changes: Any) -> Any:
    """A model whose attention is peaked enough that every key counts; float32."""
    torch.manual_seed(5)
    with torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_config(tiny_config(model_type, **changes))
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.normal_(0, 3.0 if "embed" in name else 0.4)
    return model.eval().requires_grad_(False)


def tiny_tokenizer(template: str | None = TEMPLATE) -> Any:
    """A token for each byte of the text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: idx for idx, letter in enumerate(alphabet)} | ENDS
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    )
    wrapped.chat_template = template
    return wrapped


def tiny_author(model: Any = None, *, dtype: str = "float32", **more: Any) -> Author:
    """A model that is loaded."""
    fields = {"name": "tiny", "device": "cpu", "dtype": dtype, "identity": {}} | more
    return Author(model=model or tiny_model(), tokenizer=tiny_tokenizer(), **fields)


def write_tiny(folder: Path, model_type: str = "llama", **changes: Any) -> Path:
    """A model's folder as users have them."""
    transformers.utils.logging.disable_progress_bar()  # its thread would stay behind
    tiny_model(model_type, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_config(folder: Path, **fields: Any) -> Path:
    """A folder with a configuration alone."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | fields))
    return folder
