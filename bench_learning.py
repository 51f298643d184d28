"""The parts of bench.py that have a model in them: rollouts, decoding, PRM and DPO, each against what one would write without thinking of speed."""

import os
import tempfile
from functools import partial
from time import process_time

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from common import UserError, generator, pad, read_model, set_up_torch
from dpo import dpo_loss
from games import games_for, split_dev
from model import Cache
from optim import Muon
from prm import actions_of, bce_loss, scores_at
from qestimate import labels_of, q_table
from rollout import MAX_ACTION, feed, rollout, sample_tokens
from stock import StockAlfworldEnv
from tokenizer import END, PAD, SPECIAL, split_intro
from tree import Tree

CAP = 30  # actions an episode


def load(args):
    """-> policy, tokenizer, train games; one thread for both sides."""
    set_up_torch(1)
    if not args.policy:
        raise UserError("--policy DIR: a trained policy, such as runs/default/best/policy, is needed to play episodes of a usual length")
    policy, tokenizer = read_model(args.policy)
    train, _ = split_dev(games_for("auto", args.data, "train", 600)[0])
    return policy, tokenizer, [train[i] for i in generator("bench").permutation(len(train))]


def transformers_model(folder):
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers
    transformers.logging.set_verbosity_error()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


# --- rollouts ---------------------------------------------------------------------------------------------------------

def bench_rollout(args, row):
    """Whole episodes at temperature 1, then decoding alone. Both sides have the same weights, threads and allocator settings."""
    policy, tokenizer, games = load(args)
    model = transformers_model(args.policy)
    ours = rollout_seconds(policy, tokenizer, games[:64])
    others = {}
    for batch, n in ((1, 4), (16, 16), (64, 64)):
        others[batch] = naive_seconds(model, tokenizer, games[:n], batch)
    best = min(others, key=others.get)
    yield row("rollout.end_to_end", "ms", ours, others[best],
              f"transformers.generate on alfworld, batch {best}, of 1, 16, 64; an episode, a game loaded for 16")
    for batch in (16, 64, 256):
        for context in (350, 800):
            ours = decode_seconds(policy, batch, context)
            others = {kind: generate_seconds(model, batch, context, kind) for kind in ("dynamic", "static")}
            best = min(others, key=others.get)
            yield row(f"decode.b{batch}" + ".t800" * (context == 800), "ms", ours, others[best],
                      f"transformers.generate, {best} cache; a token of each of {batch} rows after {context}")


def rollout_seconds(policy, tokenizer, games, of_each=16):
    """CPU seconds an episode, 16 of each game, as 70,000 rollouts play them."""
    play = lambda games: list(rollout(policy, tokenizer, [(game, k) for game in games for k in range(of_each)], temperature=1.0, max_steps=CAP))
    play(games[:16])
    start = process_time()
    play(games)
    return (process_time() - start) / len(games) / of_each


@torch.no_grad()
def naive_seconds(model, tokenizer, games, batch):
    """The same by alfworld's engine and transformers, `batch` episodes at once, the whole history encoded again at every step. Of loading
    a game, which 16 rollouts share, a sixteenth."""
    masked = [i for i in range(len(SPECIAL)) if i != END]
    start, loading = process_time(), 0.0
    with tqdm(total=len(games), desc=f"batch {batch}", unit="episode", leave=False) as bar:
        for first in range(0, len(games), batch):
            rows = []
            for game in games[first:first + batch]:
                world, before = StockAlfworldEnv(CAP), process_time()
                world.load(game)
                loading += process_time() - before
                rows.append((world, list(tokenizer.prompt(*split_intro(world.reset(game)[0])))))
            while rows:
                length = max(len(ids) for _, ids in rows)
                ids = torch.tensor([[PAD] * (length - len(ids)) + ids for _, ids in rows])
                out = model.generate(ids, attention_mask=(ids != PAD).long(), max_new_tokens=MAX_ACTION, do_sample=True, temperature=1.0, top_k=0,
                                     eos_token_id=END, pad_token_id=PAD, suppress_tokens=masked)[:, length:].tolist()
                left = []
                for (world, ids), action in zip(rows, out):
                    action = action[:action.index(END)] + [END] if END in action else action
                    observation, _, won, truncated, info = world.step(tokenizer.decode(action))
                    info["admissible_commands"]
                    if won or truncated:
                        bar.update()
                    else:
                        left.append((world, ids + action + list(tokenizer.turn(observation))))
                rows = left
    return (process_time() - start - loading * 15 / 16) / len(games)


STEPS = 24  # tokens decoded


@torch.no_grad()
def decode_seconds(policy, batch, context):
    """Median CPU seconds of a token in each row of a batch, by the steps that `rollout` takes."""
    ids = generator("decode").integers(len(SPECIAL), policy.config.vocab_size, (batch, context))
    cache, lengths, rows = Cache(policy.config, batch, context + STEPS), np.zeros(batch, np.int64), np.arange(batch)
    for part in np.array_split(np.arange(context), -(-batch * context // 16384)):
        h = feed(policy, cache, rows, lengths, ids[:, part])
    times = []
    for step in range(STEPS):
        start = process_time()
        tokens, _ = sample_tokens(policy, h, (rows, step), 1.0)
        h = feed(policy, cache, rows, lengths, tokens[:, None])
        times.append(process_time() - start)
    return float(np.median(times))


def generate_seconds(model, batch, context, kind):
    """The same by `generate`; times are taken where it would let the caller change the logits."""
    ids = torch.from_numpy(generator("decode").integers(len(SPECIAL), model.config.vocab_size, (batch, context)))
    times = []

    def stamp(ids, scores):
        times.append(process_time())
        return scores

    from transformers import LogitsProcessorList
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=True, top_k=0,
                   pad_token_id=PAD, eos_token_id=END, cache_implementation=kind, logits_processor=LogitsProcessorList([stamp]))
    return float(np.median(np.diff(times)))


# --- training ---------------------------------------------------------------------------------------------------------

def trajectories_of(policy, tokenizer, games, n=16, per_game=4):
    return list(rollout(policy, tokenizer, [(game, k) for game in games[:n // per_game] for k in range(per_game)], temperature=1.0, max_steps=CAP))


def turns(run, n):
    """Median CPU seconds of n calls, after one to warm up."""
    times = []
    for _ in range(n + 1):
        start = process_time()
        run()
        times.append(process_time() - start)
    return float(np.median(times[1:]))


def passes(model, items, loss_of):
    """Forward and backward through batches of 16. -> the sum of their losses"""
    model.zero_grad()
    total = 0.0
    for i in range(0, len(items), 16):
        loss = loss_of(items[i:i + 16])
        loss.backward()
        total += float(loss.detach())
    return total


def equal_losses(ours, theirs):
    """-> both, if they are the same."""
    a, b = ours(), theirs()
    if abs(a - b) > 1e-4:
        raise AssertionError(f"the two losses differ: {a}, {b}")
    return a, b


def bench_prm(args, row):
    """A forward and backward pass over the labels of 64 trajectories: Q at all actions of one in one pass, or a sequence for each (s, a)."""
    policy, tokenizer, games = load(args)
    trajectories = trajectories_of(policy, tokenizer, games, 64)
    table = q_table(trajectories, tokenizer, 0.95)
    labels = labels_of(trajectories, table)
    visits = [(t.ids[:end], q) for t, (q_hat, _) in zip(trajectories, labels) for (_, end), q in zip(t.spans, q_hat)]
    once = sorted((visits[i] for i in np.unique(table["pair"], return_index=True)[1]), key=lambda one: len(one[0]))  # each (s, a), not each visit
    trajectories, labels = zip(*sorted(zip(trajectories, labels), key=lambda pair: len(pair[0].ids)))
    prm = policy.with_score_head()
    torch.nn.init.normal_(prm.score.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    total = float(sum(weight.sum() for _, weight in labels))

    def in_one_pass(part):
        trajectories, labels = zip(*part)
        q_hat, weight = (torch.from_numpy(np.concatenate([l[k] for l in labels])) for k in (0, 1))
        return bce_loss(scores_at(prm, prm(pad([t.ids for t in trajectories])), actions_of(trajectories)), q_hat, weight, total)

    def a_sequence_each(part):
        ids, q_hat = zip(*part)
        f = prm.scores(prm(pad(ids))[range(len(ids)), [len(x) - 1 for x in ids]])
        return bce_loss(f, torch.tensor(q_hat), torch.ones(len(q_hat)), total)

    ours, theirs = partial(passes, prm, list(zip(trajectories, labels)), in_one_pass), partial(passes, prm, once, a_sequence_each)
    a, b = equal_losses(ours, theirs)
    yield row("prm.labels", "ms", turns(ours, 5) / len(once), turns(theirs, 1) / len(once),
              f"a sequence for each (s, a); {len(once)} labels, losses {a:.5f} and {b:.5f}")


def bench_dpo(args, row):
    """A forward and backward pass over pairs at 2 states of each of 64 trajectories: as trees, or by TRL's DPOTrainer."""
    import datasets
    import transformers
    import trl
    policy, tokenizer, games = load(args)
    reference, _ = read_model(args.policy)
    with torch.no_grad():
        for p in policy.parameters():  # not the reference's, or every loss is log 2
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    trajectories = sorted(trajectories_of(policy, tokenizer, games, 64), key=lambda t: len(t.ids))
    rng, pairs = generator("pairs"), []
    for t in trajectories:
        for k in sorted(rng.choice(len(t), min(len(t), 2), replace=False)):
            start, end = t.spans[k]
            other = rng.integers(len(SPECIAL), len(tokenizer), end - start - 1).tolist() + [END]
            pairs.append((t, int(start), t.ids[start:end].tolist(), other))
    with tempfile.TemporaryDirectory() as folder:
        policy.save(folder), tokenizer.save(folder)
        words = transformers.AutoTokenizer.from_pretrained(folder)
        words.pad_token, words.eos_token = "<pad>", "<end>"
        trainer = trl.DPOTrainer(transformers_model(folder), transformers_model(args.policy), processing_class=words,
                                 args=trl.DPOConfig(output_dir=folder, beta=0.1, report_to="none", use_cpu=True, bf16=False, disable_dropout=False),
                                 train_dataset=datasets.Dataset.from_list([{"prompt": "go", "chosen": " to", "rejected": " on"}]))

    def as_trees(part):
        number = {id(t): b for b, t in enumerate(part)}
        branches = [(number[id(t)], start, action, False) for t, start, *two in pairs if id(t) in number for action in two]
        tree = Tree([t.ids for t in part], branches)
        with torch.no_grad():
            ref = plain_logprobs(tree, reference).view(-1, 2)
        pi = plain_logprobs(tree, policy).view(-1, 2)
        return dpo_loss(pi[:, 0], pi[:, 1], ref[:, 0], ref[:, 1], 0.1)[0].sum() / len(pairs)

    def by_trl(part):
        rows = [[*t.ids[:start].tolist(), *actions[k]] for k in (0, 1) for t, start, *actions in part]
        mask = [[0] * start + [1] * len(actions[k]) for k in (0, 1) for t, start, *actions in part]
        batch = {"input_ids": pad(rows, PAD), "attention_mask": pad([[1] * len(row) for row in rows]), "completion_mask": pad(mask)}
        return trainer.compute_loss(trainer.model, batch) * len(part) / len(pairs)

    ours, theirs = partial(passes, policy, trajectories, as_trees), partial(passes, trainer.model, pairs, by_trl)
    a, b = equal_losses(ours, theirs)
    yield row("dpo.pairs", "ms", turns(ours, 5) / len(pairs), turns(theirs, 3) / len(pairs),
              f"trl {trl.__version__}'s DPOTrainer; {len(pairs)} pairs, losses {a:.5f} and {b:.5f}")


def plain_logprobs(tree, model):
    """`Tree.logprobs` at temperature 1 without the mask of special tokens, which TRL does not have."""
    h = tree.hidden(model)
    logp = model.logits(h[tree.token_row, tree.token_before]).log_softmax(-1).gather(-1, tree.ids[tree.token_row, tree.token_place][:, None])[:, 0]
    return logp.new_zeros(len(tree.branch_end)).index_add(0, tree.token_branch, logp)


# --- the optimiser ----------------------------------------------------------------------------------------------------

def bench_muon(args, row):
    """A step over the matrices of all layers."""
    policy, _, _ = load(args)
    matrices = [p for name, p in policy.named_parameters() if p.ndim == 2 and ".layers." in name]
    for p in matrices:
        p.grad = torch.randn_like(p)
    ours, theirs = Muon(matrices, 1e-3, 0.01), torch.optim.Muon(matrices, lr=1e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    yield row("muon.step", "ms", turns(ours.step, 7), turns(theirs.step, 7), f"torch.optim.Muon, in bfloat16; {len(matrices)} matrices")


# --- the floor --------------------------------------------------------------------------------------------------------

def bench_floor(args, row):
    """What the machine could do at best: floating-point operations at the speed of a large matrix product, or bytes at that of a copy.

    The ratio is the share of that speed which is reached.
    """
    policy, tokenizer, games = load(args)
    a, b = torch.randn(2, 2048, 2048)
    flops = 2 * 2048 ** 3 / turns(lambda: a @ b, 5)
    big, to = torch.zeros(2, 2 ** 26)
    bandwidth = 2 * big.nbytes / turns(lambda: to.copy_(big), 5)
    yield row("floor.matmul", "GFLOP/s", flops / 1e9, flops / 1e9, "a product of 2048 × 2048 matrices")
    yield row("floor.copy", "GB/s", bandwidth / 1e9, bandwidth / 1e9, "a copy of 256 MB, read and written")
    trajectories = trajectories_of(policy, tokenizer, games, 64)
    trajectories.sort(key=lambda t: len(t.ids))
    tokens = sum(len(t.ids) for t in trajectories)
    play = lambda: list(rollout(policy, tokenizer, [(game, k) for game in games[:32] for k in range(4)], temperature=1.0, max_steps=CAP))
    plain = lambda part: policy.logits(policy(pad([t.ids for t in part]))).logsumexp(-1).mean()  # the PRM's training, and nearly that of DPO
    read = [0]

    def counted(ids, rows, slots, cache, extend=policy.extend):
        """Bytes that this turn must read: the weights, and of each row all keys and values so far."""
        last = torch.cat([rows[1:] != rows[:-1], rows.new_ones(1, dtype=torch.bool)])
        c = policy.config
        read[0] += 4 * policy.n_parameters() + 4 * 2 * c.n_layers * c.n_kv_heads * c.dim // c.n_heads * int((slots[last] + 1).sum())
        return extend(ids, rows, slots, cache)

    policy.extend = counted
    episodes = len(play())
    del policy.extend
    for name, run, n, unit, loaded in (("rollouts", play, episodes, "ms", read[0]),
                                       ("PRM", partial(passes, policy, trajectories, plain), tokens, "us", 0)):
        with FlopCounterMode(display=False) as counter:
            run()
        work, seconds = counter.get_total_flops(), turns(run, 3)
        what = "an episode" if name == "rollouts" else "a token, forward and backward"
        yield row(f"floor.{name}.compute", unit, seconds / n, work / flops / n, f"{what}: {work / n / 1e6:.1f} MFLOP")
        if loaded:
            yield row(f"floor.{name}.memory", unit, seconds / n, loaded / bandwidth / n,
                      f"{what}: {loaded / n / 1e6:.1f} MB of weights, keys and values")
