"""CLIP and T5 tokenizers for the prompts' few words, built without any download."""

import json
import string
from collections.abc import Sequence

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5Tokenizer

from benchmark.small.scenes import COLOURS, PATTERNS, SHAPES

MAX_LENGTH = 24
WORDS = ("a", "an", "and", "on", "background", *COLOURS, *SHAPES, *PATTERNS)
_START, _END = "<|startoftext|>", "<|endoftext|>"


def build_clip_tokenizer() -> CLIPTokenizer:
    """A byte-pair tokenizer that makes one token of each of `WORDS`."""
    letters = string.ascii_lowercase + string.digits + string.punctuation
    model = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        min_frequency=1,
        end_of_word_suffix="</w>",
        special_tokens=[*letters, *(letter + "</w>" for letter in letters), _START, _END],
        show_progress=False,
    )
    model.train_from_iterator([" ".join(WORDS)], trainer)
    trained = json.loads(model.to_str())["model"]
    return CLIPTokenizer(
        vocab=trained["vocab"],
        merges=[tuple(pair) for pair in trained["merges"]],
        model_max_length=MAX_LENGTH,
    )


def build_t5_tokenizer(
    words: Sequence[str] = WORDS, model_max_length: int = MAX_LENGTH
) -> T5Tokenizer:
    """A unigram tokenizer of `words`, with single characters for everything else."""
    characters = string.ascii_letters + string.digits + string.punctuation
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    vocabulary += [("▁" + word, -1.0) for word in words]
    vocabulary += [(character, -10.0) for character in characters]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=model_max_length)
