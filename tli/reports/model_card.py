"""README.md of an adapter: front matter for the hub, the numbers with their controls, how to load it, what it is not."""

from __future__ import annotations

import json
import re

from tli.metrics.measures import names
from tli.model.shape import Layer
from tli.reports.run_tables import READING, hub_name, languages, rows_as_markdown, summary, value_rows
from tli.reports.wording import aligned_layer, compared_layers, place_name

_LANGUAGE_CODES = {"swahili": "sw", "english": "en"}


def model_card(report: dict) -> str:
    """README.md of the adapter: front matter for the hub, the numbers with their controls, how to load it, what it is not for."""
    config, layer = report["config"], aligned_layer(report)
    base = hub_name(report["model"]["name"])
    codes = [code for code in map(_language_code, (config["source"], config["target"])) if code]
    front = [f"base_model: {json.dumps(base)}", "library_name: peft", "pipeline_tag: feature-extraction"]
    front += ["language:", *(f"- {code}" for code in codes)] if codes else []
    front += ["tags:", *(f"- {tag}" for tag in ("lora", "peft", "tli", "cross-lingual-alignment", "lexical-alignment"))]
    parts = ["---\n" + "\n".join(front) + "\n---", f"# {base}: {languages(report)} words aligned at {place_name(layer)}", summary(report)]
    parts += ["## What the numbers show", report["verdict"]]
    for place in compared_layers(report, report["measurements"]):
        parts += [f"### {place_name(place).capitalize()}", rows_as_markdown(value_rows(report, place, names("headline"), " "))]
    parts += [
        READING,
        "## How to load it",
        _LOADING.format(
            base=base,
            loads_by=report["model"].get("loads_by", "AutoModelForCausalLM"),
            state=-1 if layer == "output" else layer,
            first=_first(report["model"].get("first_token")),
            prefix=_prefix(config),
            pool=_pool(config, layer),
        ),
    ]
    if config.get("map", "none") != "none":
        parts.append(_MAP.format(source=config["source"], target=config["target"]))
    return "\n\n".join([*parts, _CAVEATS.format(place=place_name(layer))]) + "\n"


_LOADING = """\
```python
from peft import PeftModel
from transformers import {loads_by}

base = {loads_by}.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```

A word's vector is made from `output_hidden_states=True`, `hidden_states[{state}]` of the word alone behind
{first}{prefix}: {pool}."""

_MAP = """\
Behind the map in `map.safetensors` the two languages may be nearer still (the table above says whether): for {source}
`(vector - source_mean) @ source_matrix`, for {target} `(vector - target_mean) @ target_matrix`, then unit length.
`tli.embed(words, adapter="path/to/this/folder", language="{source}")` does all of it."""

_CAVEATS = """\
## What it is not

It aligns single words of one list at {place}. It was not tested on sentences, translation or text generation; blocks above the
adapters see changed states, and the model's other abilities may have suffered. Held-out words come from the same list as the trained ones.
`report.md` and `report.json` hold all numbers, tests, versions and hashes."""


def _first(token: dict | None) -> str:
    if token is None or token["is"] == "BOS":
        return "the beginning-of-sequence token"
    return f"`{token['text']}`, the end-of-sequence token (the tokenizer has no other one to begin with, and does not put it there itself)"


def _prefix(config: dict) -> str:
    written = {"": "", " ": " and a space"}
    return written.get(config.get("prefix", ""), f" and the text {config.get('prefix')!r}")


def _pool(config: dict, layer: Layer) -> str:
    norms = {
        "final": "each token state through the model's final norm",
        "rms": "each token state over its root mean square",
        "none": "the token states",
    }
    first = "the first position included" if config["eval_pool_bos"] else "the first position left out"
    # the output is normalised already
    token_states = norms["none" if layer == "output" else config["token_norm"]]
    return f"{token_states}, their mean over the word's tokens, {first}, then unit length"


def _language_code(name: str) -> str | None:
    return _LANGUAGE_CODES.get(name.lower()) or (name.lower() if re.fullmatch(r"[A-Za-z]{2,3}", name) else None)
