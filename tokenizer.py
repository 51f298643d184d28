"""Text <-> token ids, and the transcript: one append-only token sequence an episode.

    <task> put a mug in desk. <obs> You are in … <act> go to desk 1 <end> You arrive at … <act> …

The PRM reads Q(s_t, a_t) at the <end> of an action and V(s_t) at the <act> before it.

A name and its number are two tokens, " desk" and " 1": then the desk in view and the desk that the
task asks for share a token. The text between names is one of a few hundred fixed phrases ("You
arrive at", ", you see a"), each one token. Other text falls back to words and characters."""

import hashlib
import re
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer as HFTokenizer, decoders, models, pre_tokenizers

SPECIAL = ("<pad>", "<unk>", "<task>", "<obs>", "<act>", "<end>")
PAD, UNK, TASK, OBS, ACT, END = range(len(SPECIAL))
CHARACTERS = [chr(c) for c in range(32, 127)] + ["\n"]


class Tokenizer:
    """A `tokenizers` tokenizer: greedy longest match inside names, numbers and phrases."""

    def __init__(self, hf):
        self.hf = hf
        hf.encode_special_tokens = True  # "<end>" in a text is five characters
        self.tokens = [hf.id_to_token(i) for i in range(hf.get_vocab_size())]
        if self.tokens[:len(SPECIAL)] != [*SPECIAL]:
            raise ValueError(f"a vocabulary must begin with {' '.join(SPECIAL)}")
        if hf.truncation or hf.padding or hf.normalizer:
            raise ValueError("a tokenizer that cuts, pads or changes the text")
        text = "\n".join(self.tokens).encode()
        self.fingerprint = hashlib.sha256(text).hexdigest()[:16]  # models remember it
        self.encode = lru_cache(maxsize=200_000)(self._encode)  # observations recur

    def __len__(self):
        return len(self.tokens)

    def _encode(self, text):
        """Text -> tuple of ids, without special tokens."""
        return tuple(self.hf.encode(text, add_special_tokens=False).ids)

    def decode(self, ids):
        """Ids -> text; special tokens other than <unk> are left out."""
        return "".join(self.tokens[i] for i in ids if i == UNK or i >= len(SPECIAL))

    def prompt(self, task, observation):
        """The tokens that open an episode, up to the <act> before the first action."""
        return (TASK, *self.encode(task), OBS, *self.turn(observation))

    def turn(self, observation):
        """The tokens between the <end> of one action and the first token of the next."""
        return (*self.encode(observation), ACT)

    def actions(self, ids):
        """The texts of all whole actions in a transcript."""
        ids = np.asarray(ids)
        starts, ends = np.nonzero(ids == ACT)[0] + 1, np.nonzero(ids == END)[0]
        return [self.decode(ids[start:end]) for start, end in zip(starts, ends)]

    def save(self, folder):
        """Write `tokenizer.json`, and `tokenizer_config.json` for transformers."""
        self.hf.save(str(Path(folder) / "tokenizer.json"))
        config = '{"tokenizer_class": "PreTrainedTokenizerFast"}\n'
        (Path(folder) / "tokenizer_config.json").write_text(config)

    @classmethod
    def load(cls, folder):
        return cls(HFTokenizer.from_file(str(Path(folder) / "tokenizer.json")))

    @classmethod
    def train(cls, texts, counts, joined=False, min_count=5, max_phrases=600):
        """A vocabulary from game texts and {name without number: its highest number}.

        joined: a name and its number are one token, for comparison."""
        names = "|".join(sorted(map(re.escape, counts), key=len, reverse=True))
        name = f"(?: |(?<![a-z]))(?:{names})"  # " desk", " desk 1"
        name += "(?: [0-9]+)?(?![a-z0-9])" if joined else "(?![a-z0-9])| [0-9]+(?![a-z0-9])"
        numbers = [f" {k}" for k in range(1, max(counts.values()) + 1)]
        named = ([f" {base}{k}" for base in sorted(counts) for k in ["", *numbers[:counts[base]]]]
                 if joined else [*(f" {base}" for base in sorted(counts)), *numbers])
        phrases, words = Counter(), Counter()
        for text in texts:
            for phrase in re.split(name, text):
                phrases[phrase] += 1
                words.update(re.findall(r" ?[A-Za-z]+|[^A-Za-z ]", phrase))
        vocabulary = dict.fromkeys((*SPECIAL, *CHARACTERS, *named))
        for counter in (words, phrases):
            frequent = sorted((-n, piece) for piece, n in counter.items()
                              if n >= min_count and piece)
            vocabulary.update(dict.fromkeys(piece for _, piece in frequent[:max_phrases]))
        hf = HFTokenizer(models.WordPiece(
            {token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>",
            continuing_subword_prefix="", max_input_chars_per_word=10_000))
        # A character outside the vocabulary is one <unk>; "<" stands alone.
        hf.pre_tokenizer = pre_tokenizers.Split(Regex(name + r"|[^\n -;=-~]"), "isolated")
        hf.decoder = decoders.Fuse()
        hf.add_special_tokens(list(SPECIAL))
        return cls(hf)
