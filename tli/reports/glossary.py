"""How to read a report: one explanation of each term, from which every report takes those that it uses."""

from __future__ import annotations

import textwrap

_TERMS = {
    "gap": "The *gap* is the mean score of true pairs minus that of mismatched pairs, a word with the words of other meaning; a mean "
    "cosine or CLIPScore that rises for mismatched pairs as well is a shift of all words.",
    "retrieval": "*P@1* is how often the true partner is the nearest candidate, *MRR* the mean of 1/rank; both are means of the two "
    "directions unless one is named. *Chance* is their value for ranks drawn by lot from as many candidates.",
    "lists": "Trained and held-out lists differ in length, so in chance, too.",
    "sink share": "The *sink share* is the part of a word's states, by norm, that the first position would make up if it were pooled.",
    "baselines": "What needs no training of the model was fitted on the trained pairs and ranks the held-out ones: the frozen model's "
    "cosine, closed-form maps of its states, and spelling alone. *Own class* is the MRR among words of one class, *no loans* the same of "
    "pairs that are no loan words (or not spelt alike, where the list does not say), *whole list* among all words of the list, trained "
    "ones too. An oracle is told what no aligner is.",
    "maps": "*Behind a map* is by the cosine behind closed-form maps of the trained states, fitted after training on the trained pairs, "
    "*map with n-grams* by that of states and spelling side by side; their rivals are the same maps of the frozen states.",
    "intervals": "Brackets are 95 % bootstrap intervals (BCa, 2,000 resamples); they and the sign-flip test take pairs that share a word "
    "together, t and Wilcoxon know of no such ties. An interval without width means that all pairs agree, not that the value is certain.",
    "tests": "Wilcoxon's p asks which way most pairs went, the others where their mean went: a few large gains or losses set them apart. "
    "All p are Holm's over the layers here. *d_z* is the mean gain over its scatter.",
    "TOST": "*TOST*, two one-sided tests, asks whether trained and held-out gains differ by less than the margin: p < .05 says so.",
    "CLIPScore": "*CLIP-S*, CLIPScore, is 2.5 times the cosine, none below 0.",
    "RefCLIPScore": "*RefCLIP-S* is its harmonic mean with the cosine of a target and the nearest of its own synonyms, which is high "
    "without any alignment of languages, so not even its gap is zero then.",
    "control": "The control for all of it is the same run with `--shuffle-pairs`.",
    "seeds": "Each value is a mean over seeds, its bracket the 95 % Student interval over them: a seed draws the split, the order, the "
    "adapters' start and the dropout, so the interval is about all of these.",
    "trends": "*Page* asks whether a value rises or falls with the rank, seeds being blocks; *Spearman* correlates it with log2 R and "
    "takes all runs for independent.",
    "arms": "The arms are compared seed by seed (paired t); Holm's correction runs over the ranks.",
    "shuffled": "*Shuffled* is the same training on mismatched pairs: what still rises there is not alignment.",
}


def how_to_read(*terms: str) -> str:
    """One paragraph that explains these terms, in this order."""
    return textwrap.fill(" ".join(["How to read this.", *(_TERMS[term] for term in terms)]), 140, break_on_hyphens=False)
