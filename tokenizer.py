"""Text <-> token ids, and the transcript: one append-only token sequence an episode.

    <task> put a mug in desk. <obs> You are in … <act> go to desk 1 <end> You arrive at … <act> …

The <end> of an action also opens the world's answer. So the place that predicts how the answer begins ("Nothing happens.",
say) is the one where the PRM reads Q(s, a).

Two things about the game text shape the vocabulary. A name and its number are one token (" desk 1"): small models that see
them apart copy the name and guess the number (METHOD, "what is known about learning it"). And what stands between two names
is one of a few hundred fixed phrases ("You arrive at", ". On the", ", you see a"), each one token as well: an action is 3 to
5 tokens and an episode half as long as word by word. Anything else falls back to words and characters, without loss.
"""

import re
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer as HFTokenizer, decoders, models, pre_tokenizers

SPECIAL = ("<pad>", "<unk>", "<task>", "<obs>", "<act>", "<end>")
PAD, UNK, TASK, OBS, ACT, END = range(len(SPECIAL))
CHARACTERS = [chr(c) for c in range(32, 127)] + ["\n"]
INTRO = re.compile(r"(?:-= Welcome to TextWorld, ALFRED! =-\n\n)?(.*?)\n\nYour task is to: (.*)", re.DOTALL)


class Tokenizer:
    """A `tokenizers` tokenizer of the vocabulary above: greedy longest match inside names and phrases."""

    def __init__(self, hf):
        self.hf = hf
        hf.encode_special_tokens = True  # "<end>" in a text is five characters
        self.tokens = [hf.id_to_token(i) for i in range(hf.get_vocab_size())]
        self.base_of = {i: m[1] for i, token in enumerate(self.tokens)  # of a name with its number
                        if (m := re.fullmatch(r" (.+) [0-9]+", token)) and hf.token_to_id(f" {m[1]}") is not None}
        self._instances = {}
        self.encode = lru_cache(maxsize=200_000)(self._encode)  # observations recur by the thousand

    def __len__(self):
        return len(self.tokens)

    def _encode(self, text):
        """Text -> tuple of ids (no special tokens)."""
        return tuple(self.hf.encode(text, add_special_tokens=False).ids)

    def decode(self, ids):
        """Ids -> text; special tokens other than <unk> vanish."""
        return "".join(self.tokens[i] for i in ids if i == UNK or i >= len(SPECIAL))

    def prompt(self, task, observation):
        """The tokens that open an episode, up to and including the <act> that asks for the first action."""
        return (TASK, *self.encode(task), OBS, *self.turn(observation))

    def turn(self, observation):
        """The tokens between the <end> of one action and the first token of the next."""
        return (*self.encode(observation), ACT)

    def action(self, command):
        """The tokens of an action, its <end> included."""
        return (*self.encode(command), END)

    def command(self, ids):
        """The text of an action, spaces around it left out, as the world reads it: what tells two actions apart."""
        return self.decode(ids).strip()

    def actions(self, ids):
        """The texts of all whole actions in a transcript."""
        ids = np.asarray(ids)
        starts, ends = np.nonzero(ids == ACT)[0] + 1, np.nonzero(ids == END)[0]
        return [self.decode(ids[start:end]) for start, end in zip(starts, ends)]

    def instances(self, base):
        """Ids of "base 1", "base 2", … as far as the vocabulary goes."""
        if base not in self._instances:
            ids = []
            while (token := self.hf.token_to_id(f" {base} {len(ids) + 1}")) is not None:
                ids.append(token)
            self._instances[base] = np.array(ids, np.int64)
        return self._instances[base]

    def renumber(self, ids, counts, rng, any_number=False):
        """Another telling of the same episode: other instance numbers, consistently.

        ids (L,) array, counts the game's {base name: n}, rng a numpy generator. The n instances of a name have their numbers
        1 … n permuted (`any_number`: with all the numbers that this name has in the vocabulary), so that the right one is only
        to be had by looking what was seen. A name with instances outside the vocabulary keeps its numbers.
        """
        table = np.arange(len(self))
        for base, n in sorted(counts.items()):
            known = self.instances(base)
            if n <= len(known):
                permuted = known if any_number else known[:n]
                table[permuted] = rng.permutation(permuted)
        return table[ids]

    def swap_names(self, ids, a, b):
        """The same text with the base names a and b exchanged and numbers kept, as far as both have them."""
        table = np.arange(len(self))
        A, B = ([self.hf.token_to_id(f" {base}"), *self.instances(base)] for base in (a, b))
        for x, y in zip(A, B):
            table[[x, y]] = y, x
        return table[ids]

    def save(self, folder):
        """Write `tokenizer.json`, and `tokenizer_config.json`: without it transformers would take the vocabulary for Qwen's."""
        self.hf.save(str(Path(folder) / "tokenizer.json"))
        (Path(folder) / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}\n')

    @classmethod
    def load(cls, folder):
        return cls(HFTokenizer.from_file(str(Path(folder) / "tokenizer.json")))

    @classmethod
    def train(cls, texts, counts, min_count=5, max_phrases=600):
        """Vocabulary from game texts and {base name: highest number}; names come with every number from 1 up."""
        names = "|".join(sorted(map(re.escape, counts), key=len, reverse=True))
        name = f"(?: |(?<![a-z]))(?:{names})(?: [0-9]+)?(?![a-z0-9])"  # " desk 1", " desk"
        phrases, words = Counter(), Counter()
        for text in texts:
            for phrase in re.split(name, text):
                phrases[phrase] += 1
                words.update(re.findall(r" ?[A-Za-z]+|[^A-Za-z ]", phrase))
        vocabulary = dict.fromkeys(SPECIAL)
        vocabulary.update(dict.fromkeys(CHARACTERS))
        vocabulary.update(dict.fromkeys(f" {b}{k}" for b in sorted(counts) for k in ["", *(f" {i}" for i in range(1, counts[b] + 1))]))
        for counter in (words, phrases):
            frequent = sorted((-n, piece) for piece, n in counter.items() if n >= min_count and piece)
            vocabulary.update(dict.fromkeys(piece for _, piece in frequent[:max_phrases]))
        hf = HFTokenizer(models.WordPiece({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>",
                                          continuing_subword_prefix="", max_input_chars_per_word=10_000))
        hf.pre_tokenizer = pre_tokenizers.Split(Regex(name + r"|[^\n -;=-~]"), "isolated")  # <unk> for one character; "<" alone
        hf.decoder = decoders.Fuse()
        hf.add_special_tokens(list(SPECIAL))
        return cls(hf)


def split_intro(intro):
    """The game's first text -> (task, first observation)."""
    observation, task = INTRO.fullmatch(intro).groups()
    return task, observation
