"""The transformers class that others load a checkpoint by, and where in it the decoder lies: PEFT names modules by that class's paths.

Of a plain decoder that is its ForCausalLM class. A model of text and images is another class, its decoder lies deeper, and its vision tower
has layers of the same names.
"""

import dataclasses

from tli.model.checkpoint import Checkpoint
from tli.runtime.errors import TliError, one_line


@dataclasses.dataclass(frozen=True)
class WholeModel:
    """``loads_by``: what to import from transformers; ``decoder``: path of the text decoder in it; ``task``: PEFT's task type for it."""

    loads_by: str = "AutoModelForCausalLM"
    decoder: str = "model"
    task: str = "CAUSAL_LM"


def whole_model(checkpoint: Checkpoint) -> WholeModel:
    """The class that config.json's ``architectures`` means, built without memory to look where its decoder is.

    Raises:
        TliError: a class that transformers does not know, cannot build here, or in which it finds no decoder.
    """
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(checkpoint.folder or checkpoint.name, trust_remote_code=False)
    if config.get_text_config() is config:
        return WholeModel(decoder=checkpoint.family.causal_lm)
    named = (config.architectures or ["none"])[0]
    must = "transformers must be able to build the class that config.json names under architectures, as adapters are named by its modules"
    try:
        with torch.device("meta"):
            whole = getattr(transformers, named)(config)
        decoder = whole.get_decoder()
        path = next(path for path, module in whole.named_modules() if module is decoder)
    # the class is anyone's: one that lacks a package raises what it likes
    except Exception as error:
        raise TliError(checkpoint.name, must, f"{named} ({one_line(error)})", "install what it needs, or take a text-only model") from error
    # PEFT's wrapper for causal LMs asks a model for its inputs to generate from
    return WholeModel(named, path, "CAUSAL_LM" if whole.can_generate() else "FEATURE_EXTRACTION")
