"""Align word pairs at hidden state L with sentence-transformers' Trainer, in a model loaded with L blocks only. Prints one JSON object."""

import argparse
import csv
import json
import tempfile
import time

import torch
from datasets import Dataset
from peft import LoraConfig
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import TrainerCallback

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

# its output is behind the final norm; text is to be read as text, also by a model that has a chat template
blocks = Transformer(
    options.model,
    config_kwargs={"num_hidden_layers": options.layer},
    model_kwargs={"dtype": getattr(torch, options.dtype)},
    modality_config={"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    module_output_name="token_embeddings",
)


class FirstTokenIsPrompt(torch.nn.Module):
    """BOS is the attention's sink: as a prompt it stays out of the mean. (As ``prompts`` it would not, being a special token.)"""

    def forward(self, features):
        return features | {"prompt_length": 1}


pooling = Pooling(blocks.model.config.hidden_size, "mean", include_prompt=False)
model = SentenceTransformer(modules=[blocks, FirstTokenIsPrompt(), pooling])

with open(options.pairs, encoding="utf-8", newline="") as file:
    pairs = list(csv.DictReader(file, delimiter="\t"))
before = f"{blocks.tokenizer.bos_token} "
words = Dataset.from_dict({name: [before + pair[name] for pair in pairs] for name in ("source", "target")})

lora = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, lora_dropout=options.dropout, target_modules="all-linear")
model.add_adapter(lora)
for name, parameter in model.named_parameters():
    parameter.requires_grad_("lora_" in name)
    if "lora_" in name:
        parameter.data = parameter.data.float()

both_ways = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
loss = MultipleNegativesRankingLoss(model, scale=1 / options.temperature, **both_ways)


class FirstStep(TrainerCallback):
    at = None

    def on_step_end(self, *arguments, **named):
        FirstStep.at = FirstStep.at or time.time()


with tempfile.TemporaryDirectory() as folder:
    arguments = SentenceTransformerTrainingArguments(
        output_dir=folder,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch,
        learning_rate=options.lr,
        warmup_steps=options.warmup,
        weight_decay=0.01,
        seed=options.seed,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=words, loss=loss, callbacks=[FirstStep()])
    trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

blocks.model.save_pretrained(options.output)
print(json.dumps({"steps": len(losses), "loss_first": losses[0], "loss_last": losses[-1], "first_step_at": FirstStep.at}))
