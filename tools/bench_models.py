"""The parts of tools/bench.py that have a model in them: rollouts, decoding, PRM and DPO."""

import copy
import os
import sys
import tempfile
from pathlib import Path
from time import process_time

import numpy as np
import torch
from tqdm import tqdm

import prm as prms
from candidates import PrefixTree, score_states
from dpo import dpo_loss
from fast_alfworld import fit_prior
from fast_alfworld.cli import UserError
from fast_alfworld.gamefile import split_intro
from fast_alfworld.reference import ReferenceEnv
from model import Cache, Config, Transformer
from qestimate import labels_of, q_table
from rollout import MAX_ACTION, Episode, generate, rollout, sample
from sft import train_tokenizer
from tokenizer import END, PAD, SPECIAL
from utils import generator, pad, read_model, save_model

CAP, TEMPERATURE, OF_EACH, BATCH = 30, 0.3, 16, 16


def load_policy(folder, games, made, default):
    """-> policy, tokenizer, the folder they lie in: a random policy where the default is not one"""
    try:
        return *read_model(folder), folder
    except UserError:
        if folder != default:
            raise
    print(f"{folder}: no policy there; a random one is measured", file=sys.stderr)
    tokenizer, folder = train_tokenizer(games, fit_prior(games), 0, sample=64), Path(made, "policy")
    save_model(folder, Transformer(Config(len(tokenizer))), tokenizer)
    return *read_model(folder), folder


def transformers_model(folder):
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers
    transformers.logging.set_verbosity_error()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


# --- rollouts ------------------------------------------------------------------------------------

def bench_rollout(row, policy, tokenizer, folder, games, args):
    """Whole episodes, then decoding alone. Both sides have the same weights and one thread."""
    model = transformers_model(folder)
    games, stock = games[:max(1, args.episodes // OF_EACH)], games[:args.stock_episodes]
    of_each = min(OF_EACH, args.episodes)
    ours, each = rollout_seconds(policy, tokenizer, games, of_each, sample)
    free, free_each = rollout_seconds(policy, tokenizer, games, of_each, None)
    yield row("rollout.candidates", "ms", each, free_each,
              "the same policy's free generation; an action")
    worlds = load_worlds(stock)
    other = stock_seconds(worlds, tokenizer, lambda states: [
        score_and_draw(model, tokenizer, state) for state in states])
    yield row("rollout.transformers", "ms", ours, other, "transformers scoring the same candidates "
              "on alfworld's engine, a KV cache each; an episode, a game loaded for 16")
    other = stock_seconds(worlds, tokenizer, lambda states: generate_each(model, tokenizer, states))
    yield row("rollout.end_to_end", "ms", free, other, "transformers.generate on alfworld's "
              f"engine, batch {len(stock)}, for free generation; an episode, a game loaded for 16")
    for batch in (16, 64, 256):
        others = {kind: generate_seconds(model, batch, 350, kind) for kind in ("dynamic", "static")}
        best = min(others, key=others.get)
        yield row(f"decode.b{batch}", "ms", decode_seconds(policy, batch, 350), others[best],
                  f"transformers.generate, {best} cache; a token in each row, after 350")


def rollout_seconds(policy, tokenizer, games, of_each, act):
    """CPU seconds of an episode and of an action, `of_each` episodes a game as in stage 1."""
    def play(some):
        episodes = [Episode(game, k) for game in some for k in range(of_each)]
        return list(rollout(policy, tokenizer, episodes, temperature=TEMPERATURE, max_steps=CAP,
                            act=act))

    play(games[:2])
    start = process_time()
    played = play(games)
    seconds = process_time() - start
    return seconds / len(played), seconds / sum(map(len, played))


def load_worlds(games):
    """-> [(alfworld's engine with a game loaded, the game, CPU seconds that took)]"""
    out = []
    for game in tqdm(games, "load in alfworld's engine", unit="game", leave=False):
        world, start = ReferenceEnv(CAP), process_time()
        world.load(game)
        out.append((world, game, process_time() - start))
    return out


class Stock:
    """An episode on alfworld's engine: `new`, the ids that the cache lacks, and the candidates."""

    def __init__(self, world, tokenizer, intro, info):
        self.world, self.ids = world, list(tokenizer.prompt(*split_intro(intro)))
        self.new, self.cache, self.commands = self.ids, None, info["admissible_commands"]

    def step(self, action, tokenizer):
        """-> is the episode over?"""
        observation, _, won, truncated, info = self.world.step(action)
        self.new = [*tokenizer.encode(action), END, *tokenizer.turn(observation)]
        self.ids, self.commands = self.ids + self.new, info["admissible_commands"]
        return won or truncated


@torch.no_grad()
def stock_seconds(worlds, tokenizer, choose):
    """CPU seconds of an episode on alfworld's engine, a sixteenth of loading its game included.

    choose(list of Stock) -> their next actions, texts
    """
    start, states = process_time(), []
    with tqdm(total=len(worlds), desc="alfworld's engine", unit="episode", leave=False) as bar:
        for world, game, _ in worlds:
            states.append(Stock(world, tokenizer, *world.reset(game)))
        while states:
            actions = choose(states)
            states = [state for state, action in zip(states, actions)
                      if not state.step(action, tokenizer)]
            bar.update(len(worlds) - len(states) - bar.n)
    loading = sum(seconds for *_, seconds in worlds) / OF_EACH
    return (process_time() - start + loading) / len(worlds)


@torch.no_grad()
def score_candidates(model, tokenizer, state):
    """log π(·|s) (C,) by transformers: the history in a KV cache, then all commands as one batch of
    padded sequences behind a copy of it. Extends the state's cache."""
    out = model(torch.tensor([state.new]), past_key_values=state.cache, use_cache=True,
                logits_to_keep=1)
    state.cache, state.new = out.past_key_values, []
    commands = [[*tokenizer.encode(command), END] for command in state.commands]
    behind = copy.deepcopy(state.cache)
    behind.batch_repeat_interleave(len(commands))
    ids = pad(commands, PAD)  # (C, L); padding at the end is seen by no token that counts
    logits = model(ids[:, :-1], past_key_values=behind, use_cache=True).logits
    first = out.logits.expand(len(commands), 1, -1)
    log_p = torch.cat([first, logits], 1).log_softmax(-1).gather(2, ids[:, :, None])[:, :, 0]
    lengths = torch.tensor([len(command) for command in commands])
    used = torch.arange(ids.shape[1]) < lengths[:, None]
    return ((log_p * used).sum(1) / TEMPERATURE).log_softmax(0)


def score_and_draw(model, tokenizer, state):
    log_pi = score_candidates(model, tokenizer, state)
    return state.commands[int(torch.multinomial(log_pi.exp(), 1))]


def generate_each(model, tokenizer, states):
    """Actions by transformers.generate, all states as one batch, padded at the left."""
    length = max(len(state.ids) for state in states)
    ids = torch.tensor([[PAD] * (length - len(s.ids)) + s.ids for s in states])
    out = model.generate(
        ids, attention_mask=(ids != PAD).long(), max_new_tokens=MAX_ACTION, do_sample=True,
        temperature=TEMPERATURE, top_k=0, eos_token_id=END, pad_token_id=PAD,
        suppress_tokens=[i for i in range(len(SPECIAL)) if i != END])[:, length:].tolist()
    return [tokenizer.decode(a[:a.index(END)] if END in a else a) for a in out]


# --- decoding ------------------------------------------------------------------------------------

STEPS = 24  # tokens decoded


def random_ids(model, batch, context):
    return generator("decode").integers(len(SPECIAL), model.config.vocab_size, (batch, context))


@torch.no_grad()
def decode_seconds(policy, batch, context):
    """Median CPU seconds of a token in each row of a batch, by what free generation calls."""
    ids, rows = random_ids(policy, batch, context), np.arange(batch)
    cache, lengths, times = Cache(policy.config, batch), np.zeros(batch, np.int64), []
    for part in np.array_split(np.arange(context), -(-batch * context // 16384)):
        h = policy.extend(cache, lengths, list(ids[:, part]))
        lengths += len(part)
        h = h[np.arange(1, batch + 1) * len(part) - 1]
    for step in range(STEPS):
        start = process_time()
        tokens, _ = generate(policy, cache, rows, lengths, h, 1.0,
                             np.array([rows, rows * 0 + step]), most=1)
        h = policy.extend(cache, lengths, [t or [END] for t in tokens])
        lengths += 1
        times.append(process_time() - start)
    return float(np.median(times))


def generate_seconds(model, batch, context, kind):
    """The same by `generate`; times are taken where it lets the caller change the logits."""
    from transformers import LogitsProcessorList
    ids, times = torch.from_numpy(random_ids(model, batch, context)), []

    def stamp(ids, scores):
        times.append(process_time())
        return scores

    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=STEPS,
                   min_new_tokens=STEPS, do_sample=True, top_k=0, pad_token_id=PAD,
                   eos_token_id=END, cache_implementation=kind,
                   logits_processor=LogitsProcessorList([stamp]))
    return float(np.median(np.diff(times)))


# --- training ------------------------------------------------------------------------------------

def trajectories_of(policy, tokenizer, games):
    """64 rollouts, four of each of 16 games, by length."""
    episodes = [Episode(game, k) for game in games[:16] for k in range(4)]
    return sorted(rollout(policy, tokenizer, episodes, temperature=1.0, max_steps=CAP),
                  key=lambda t: len(t.ids))


def timed(model, batches, loss_of, turns):
    """Forward and backward passes. -> median CPU seconds, the sum of the losses"""
    times, total = [], 0.0
    for turn in range(turns + 1):  # the first one warms up
        model.zero_grad()
        start = process_time()
        losses = []
        for batch in batches:
            loss = loss_of(batch)
            loss.backward()
            losses.append(float(loss.detach()))
        times.append(process_time() - start)
        total = sum(losses)
    return float(np.median(times[1:])), total


def batches_of(items):
    return [items[i:i + BATCH] for i in range(0, len(items), BATCH)]


def compared(row, what, n, ours, other, name):
    """A row of two `timed`; the two losses must agree."""
    (seconds, loss), (others, same) = ours, other
    if abs(loss - same) > 1e-4 * max(1, abs(loss)):
        raise AssertionError(f"{what}: the two losses differ: {loss}, {same}")
    return row(what, "ms", seconds / n, others / n, f"{name}, losses {loss:.5f} and {same:.5f}")


def bench_prm(row, policy, tokenizer, folder, games, args):
    """The labels of 64 trajectories: Q at all actions in one pass, or a sequence each."""
    trajectories = trajectories_of(policy, tokenizer, games)
    table = q_table(trajectories, tokenizer, 0.95)
    labels = labels_of(trajectories, table)
    visits = [(t.ids[:end], q) for t, (q_hat, _) in zip(trajectories, labels)
              for (_, end), q in zip(t.spans, q_hat)]
    once = sorted((visits[i] for i in np.unique(table["pair"], return_index=True)[1]),
                  key=lambda visit: len(visit[0]))  # each (s, a), not each visit
    prm, n = policy.with_score_head(), len(once)
    torch.nn.init.normal_(prm.score.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    objective = prms.bce_objective(trajectories, labels)

    def one_pass(picked):  # the objective's mean over a batch -> a part of the mean over all
        return objective(prm, picked, len(picked), 0)[0] * len(picked) / len(trajectories)

    def a_sequence_each(part):
        ids, q_hat = zip(*part)
        ends = torch.tensor([len(x) - 1 for x in ids])
        f = prm.scores(prm(pad(ids))[torch.arange(len(ids)), ends])
        return prms.bce_loss(f, torch.tensor(q_hat), torch.ones(len(f))) / n

    ours = timed(prm, batches_of(range(len(trajectories))), one_pass, 3)
    yield compared(row, "prm.labels", n, ours, timed(prm, batches_of(once), a_sequence_each, 1),
                   f"a sequence for each (s, a); {n} labels")


def bench_dpo(row, policy, tokenizer, folder, games, args):
    """Pairs at two states of each of 64 trajectories: as prefix trees, or by TRL's DPOTrainer."""
    import trl
    reference, _ = read_model(folder)
    with torch.no_grad():
        for p in policy.parameters():  # not the reference's, or every loss is log 2
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    rng, pairs = generator("pairs"), []
    for t in trajectories_of(policy, tokenizer, games):
        for k in sorted(rng.choice(len(t), min(len(t), 2), replace=False)):
            start, end = t.spans[k]
            action = tuple(t.ids[start:end - 1].tolist())
            other = tuple(rng.integers(len(SPECIAL), len(tokenizer), len(action)).tolist())
            pairs.append((t.ids, int(start), action, other))
    with tempfile.TemporaryDirectory() as made:
        trainer = dpo_trainer(policy, tokenizer, folder, made)

    def as_trees(part):
        sequences = {id(ids): ids for ids, *_ in part}  # a trajectory once
        number = {name: b for b, name in enumerate(sequences)}
        states = [(number[id(ids)], start, PrefixTree(two, tuple)) for ids, start, *two in part]
        with torch.no_grad():
            ref = score_states(reference, list(sequences.values()), states)
        pi = score_states(policy, list(sequences.values()), states)
        return dpo_loss(pi[:, 0], pi[:, 1], ref[:, 0], ref[:, 1], 0.1).sum() / len(pairs)

    def by_trl(part):
        rows = [[*ids[:start].tolist(), *two[k], END] for k in (0, 1) for ids, start, *two in part]
        mask = [[0] * start + [1] * (len(two[k]) + 1) for k in (0, 1) for _, start, *two in part]
        batch = {"input_ids": pad(rows, PAD), "completion_mask": pad(mask),
                 "attention_mask": pad([[1] * len(r) for r in rows])}
        return trainer.compute_loss(trainer.model, batch) * len(part) / len(pairs)

    yield compared(row, "dpo.pairs", len(pairs), timed(policy, batches_of(pairs), as_trees, 3),
                   timed(trainer.model, batches_of(pairs), by_trl, 2),
                   f"trl {trl.__version__}'s DPOTrainer; {len(pairs)} pairs")


def dpo_trainer(policy, tokenizer, folder, made):
    """TRL's trainer of this policy, with the policy in `folder` as reference."""
    import datasets
    import transformers
    import trl
    policy.save(made), tokenizer.save(made)
    words = transformers.AutoTokenizer.from_pretrained(made)
    words.pad_token, words.eos_token = "<pad>", "<end>"
    row = {"prompt": "go", "chosen": " to", "rejected": " on"}
    return trl.DPOTrainer(
        transformers_model(made), transformers_model(folder), processing_class=words,
        args=trl.DPOConfig(output_dir=made, beta=0.1, report_to="none", use_cpu=True, bf16=False,
                           disable_dropout=False),
        train_dataset=datasets.Dataset.from_list([row]))
