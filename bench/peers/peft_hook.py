"""Align word pairs at hidden state L of the whole model with peft: a forward hook takes the state. Prints one JSON object."""

import argparse
import csv
import json
import time

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoTokenizer, get_linear_schedule_with_warmup

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="folder of the checkpoint")
parser.add_argument("pairs", help="TSV with the columns source and target")
parser.add_argument("output", help="folder for the adapter")
parser.add_argument("--layer", type=int, default=2)
parser.add_argument("--rank", type=int, default=16)
parser.add_argument("--dropout", type=float, default=0.2)
parser.add_argument("--temperature", type=float, default=0.1)
parser.add_argument("--epochs", type=int, default=1)
parser.add_argument("--batch", type=int, default=128)
parser.add_argument("--lr", type=float, default=2e-3)
parser.add_argument("--warmup", type=int, default=20)
parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()
torch.manual_seed(options.seed)
device = "cuda" if torch.cuda.is_available() else "cpu"

with open(options.pairs, encoding="utf-8", newline="") as file:
    pairs = [(row["source"], row["target"]) for row in csv.DictReader(file, delimiter="\t")]
tokenizer = AutoTokenizer.from_pretrained(options.model)


def tokenise(words):
    encoded = tokenizer([" " + word for word in words], add_special_tokens=False)["input_ids"]
    return [torch.tensor([tokenizer.bos_token_id, *word]) for word in encoded]


sources, targets = (tokenise(words) for words in zip(*pairs))

model = AutoModel.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).to(device)
# each token goes through the final norm before the mean
norm = model.norm.requires_grad_(False)
taken = {}
model.layers[options.layer - 1].register_forward_hook(lambda block, arguments, output: taken.update(states=output))
# adapters behind the hook would never get a gradient
blocks = "|".join(str(block) for block in range(options.layer))
wanted = rf"layers\.({blocks})\..*_proj"
lora = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, lora_dropout=options.dropout, target_modules=wanted)
model = get_peft_model(model, lora)
model.train()


def vectors(words):
    input_ids = torch.nn.utils.rnn.pad_sequence(words, batch_first=True)
    lengths = torch.tensor([len(word) for word in words])
    mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).to(device)
    model(input_ids=input_ids.to(device), attention_mask=mask.long(), use_cache=False)
    states = taken.pop("states")
    # BOS is the attention's sink: it stays out of the mean
    pooled = mask[:, 1:, None]
    means = (norm(states)[:, 1:].float() * pooled).sum(dim=1) / pooled.sum(dim=1)
    return F.normalize(means, dim=-1)


steps = options.epochs * -(-len(pairs) // options.batch)
parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimiser = torch.optim.AdamW(parameters, lr=options.lr, weight_decay=0.01)
schedule = get_linear_schedule_with_warmup(optimiser, options.warmup, steps)
losses, first_step_at = [], None
for _ in range(options.epochs):
    for numbers in torch.randperm(len(pairs)).split(options.batch):
        source, target = vectors([sources[i] for i in numbers] + [targets[i] for i in numbers]).chunk(2)
        logits = source @ target.T / options.temperature
        labels = torch.arange(len(logits), device=device)
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        first_step_at = first_step_at or time.time()

model.save_pretrained(options.output)
print(json.dumps({"steps": len(losses), "loss_first": losses[0], "loss_last": losses[-1], "first_step_at": first_step_at}))
