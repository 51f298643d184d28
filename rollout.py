"""Stage 1: play many episodes at once with a policy, by batched sampling from a KV cache.

    trajectories = list(rollout(policy, tokenizer, [(game, 0), (game, 1), …], temperature=0.3, seed=0))

Continuous batching: `slots` episodes are in flight; one that ends is replaced at once. The rollouts of one game share its
prompt, which is encoded once. Every random number is named by (seed, game, episode, step, token), so an episode's luck does
not depend on its neighbours in the batch.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch

from common import UserError, key, uniform
from env import NOTHING_HAPPENS, AlfworldEnv
from model import Cache
from tokenizer import END, SPECIAL, split_intro

MAX_ACTION = 16  # tokens, <end> included
FROM_DEMONSTRATION = 10 ** 6  # `Trajectory.episode` of those that began at a state of a demonstration: this and what is above


@dataclass
class Trajectory:
    """One episode as the policy saw and wrote it. `ids` ends with the <end> of the last action."""
    game: str
    ids: np.ndarray  # (L,) int32: prompt, action, observation, action, …
    spans: np.ndarray  # (T, 2) int32: action t is ids[start:end], its <end> included
    logp: np.ndarray  # (T,) float32: log-probability of each action as sampled, summed over its tokens: a record, DPO computes its own
    forced: np.ndarray  # (T,) bool: the action hit the token cap, so its <end> was not sampled
    inadmissible: np.ndarray  # (T,) bool: the world answered "Nothing happens."
    reward: float  # 1 if won
    won: bool
    truncated: bool
    seed: int
    episode: int

    def __len__(self):
        return len(self.spans)


@dataclass
class Row:
    """An episode in flight."""
    env: AlfworldEnv
    game: object
    episode: int
    key: int  # a number for the game, to name random numbers by
    ids: list  # all tokens so far; the cache holds a beginning of them
    info: dict
    prompt: tuple  # a name for what it began with
    start: int = 0  # where in ids the action being written begins
    action_logp: float = 0.0
    spans: list = field(default_factory=list)
    logp: list = field(default_factory=list)
    forced: list = field(default_factory=list)
    inadmissible: list = field(default_factory=list)

    def __post_init__(self):
        self.start = len(self.ids)


@torch.no_grad()
def rollout(policy, tokenizer, episodes, *, temperature=0.3, seed=0, slots=None, max_steps=30, admissible=False, choose=None,
            make_env=AlfworldEnv):
    """Yield a Trajectory for each (game, episode number), in the order in which they end.

    An episode (game, number, ids) begins in the midst of a transcript, `ids` up to an <act>: the actions in it are played first, and
    neither count nor belong to the Trajectory's own (its `spans`); (game, number, ids, n): n of them count. temperature 0 is greedy.
    slots: episodes in flight (default: `slots_for`). An episode is cut after `max_steps` actions or when it would outgrow the model's context.
    `admissible` restricts sampling to the commands the world would accept (for comparison; free generation otherwise).
    `choose` takes the place of plain sampling (search.py) and gives whole actions; it leaves the cache and lengths as they are.

    Every turn of the loop feeds each row what its cache lacks, one sampled token or the world's answer, and samples one token: no
    row waits for another to finish its action.
    """
    waiting = deque(episodes)
    slots = min(slots or slots_for(policy), len(waiting))
    left = {}  # name of a prompt -> episodes still to start, so that it can be forgotten in time
    for episode in waiting:
        left[prompt_of(*episode)] = left.get(prompt_of(*episode), 0) + 1
    cache = Cache(policy.config, slots, 0, policy.cos.device)
    prompts = {}  # name of a prompt -> cached keys and values of its prompt without the last token
    rows, envs = [None] * slots, [make_env(max_steps) for _ in range(slots)]
    lengths = np.zeros(slots, dtype=np.int64)  # tokens in the cache

    def draw(live, h):
        """The next token of each live row, or the action that `choose` gives, from hidden states h (B, D). -> [(ids, log-probability)]"""
        names = np.array([(seed, rows[i].key, rows[i].episode, len(rows[i].spans), len(rows[i].ids) - rows[i].start) for i in live]).T
        if choose:
            drawn = zip(*choose(policy, tokenizer, cache, live, lengths, h, names[:-1], temperature, [rows[i].ids for i in live]))
            return [(action[:-1] if forced else action, logp) for action, logp, forced in drawn]
        allowed = [continuations(tokenizer, rows[i].info["admissible_commands"], rows[i].ids[rows[i].start:]) for i in live] if admissible else None
        tokens, logps = sample_tokens(policy, h, names, temperature, allowed)
        return [([token], logp) for token, logp in zip(tokens.tolist(), logps.tolist())]

    turn = 0
    while waiting or any(rows):
        turn += 1
        started = []
        for i in range(len(rows)):
            if rows[i] is None and waiting:
                rows[i] = begin(Row, envs[i], tokenizer, policy.config.max_len, *waiting.popleft())
                started.append(i)
        encode_prompts(policy, cache, [(i, rows[i].prompt, rows[i].ids[:-1]) for i in started], prompts)
        for i in started:
            lengths[i] = len(rows[i].ids) - 1
            left[rows[i].prompt] -= 1
            if not left[rows[i].prompt]:
                del prompts[rows[i].prompt]
        live = np.array([i for i in range(len(rows)) if rows[i]])
        if 2 * len(live) <= len(rows) or turn % 32 == 0:  # close gaps, and let rows of like length stand together (Transformer.extend)
            live = live[np.argsort(lengths[live], kind="stable")]
            rows, envs, lengths, cache = [rows[i] for i in live], [envs[i] for i in live], lengths[live], cache.take(live)
            live = np.arange(len(rows))
        h = feed(policy, cache, live, lengths, [rows[i].ids[lengths[i]:] for i in live])
        for i, (tokens, logp) in zip(live, draw(live, h)):
            row = rows[i]
            row.ids += tokens
            row.action_logp += logp
            if row.ids[-1] != END and len(row.ids) - row.start < MAX_ACTION - 1:
                continue
            trajectory = act(row, tokenizer, policy.config.max_len, seed)
            if trajectory is not None:
                yield trajectory
                rows[i] = None


def prompt_of(game, episode, begun=None, played=0):
    """What to know an episode's prompt by: rollouts that begin at the start of a game share it, and those that fork at one state."""
    return (game.id,) if begun is None else (game.id, begun.tobytes())


def begin(kind, env, tokenizer, context, game, episode, begun=None, played=0):
    """The first turn of an episode, or the next after the transcript `begun` of which `played` actions count,
    as a `kind`: Row, or a class made from it.

    UserError if it does not fit the context.
    """
    intro, info = env.reset(game)
    for action in () if begun is None else tokenizer.actions(begun):
        info = env.step(action)[-1]
    env.steps = played
    ids = tokenizer.prompt(*split_intro(intro)) if begun is None else begun.tolist()
    row = kind(env, game, episode, key(game.id), list(ids), info, prompt_of(game, episode, begun))
    if row.start + MAX_ACTION > context:
        raise UserError(f"{game.id}: the first observation ({row.start} tokens) does not fit a context of {context}")
    return row


def act(row, tokenizer, context, seed):
    """Take the action that row.ids ends in to the world. -> the Trajectory if that ends the episode; else None, and the answer is appended"""
    row.forced.append(row.ids[-1] != END)
    if row.forced[-1]:
        row.ids.append(END)
    row.spans.append((row.start, len(row.ids)))
    row.logp.append(row.action_logp)
    observation, reward, won, truncated, row.info = row.env.step(tokenizer.decode(row.ids[row.start:]))
    row.inadmissible.append(observation == NOTHING_HAPPENS)
    answer = tokenizer.turn(observation)
    truncated = truncated or (not won and len(row.ids) + len(answer) + MAX_ACTION > context)
    if won or truncated:
        return Trajectory(row.game.id, np.array(row.ids, np.int32), np.array(row.spans, np.int32), np.array(row.logp, np.float32),
                          np.array(row.forced), np.array(row.inadmissible), reward, won, truncated, seed, row.episode)
    row.ids += answer
    row.start, row.action_logp = len(row.ids), 0.0
    return None


def slots_for(policy, width=1):
    """Episodes in flight: 128 on a CPU (more gain nothing), 1024 on a GPU, or as many as 2 GiB hold at full length.

    width: actions sampled at each state; as they share rows where they read the same, a quarter of them is counted. Not what happens to
    be free: a shard must be the same whoever plays it.
    """
    device, c = policy.cos.device, policy.config
    row = 2 * c.max_len * Cache(c, 1, 1, device).k.nbytes  # bytes
    return max(1, min(128 if device.type == "cpu" else 1024, 2 ** 31 // (row * (1 + width // 4))))


def encode_prompts(policy, cache, started, prompts):
    """Put each started row's prompt (row, name, ids) into the cache; a prompt seen before is copied from `prompts`."""
    new = {name: (row, ids) for row, name, ids in reversed(started) if name not in prompts}
    order = sorted(new.values())
    if order:
        feed(policy, cache, np.array([row for row, _ in order]), np.zeros(cache.rows, np.int64), [ids for _, ids in order])
        for name, (row, ids) in new.items():
            prompts[name] = cache.read(row, len(ids))
    for row, name, _ in started:
        cache.write(row, prompts[name])


def feed(policy, cache, rows, lengths, tokens):
    """Append tokens[j] to cache row rows[j] (ascending), raising lengths. -> hidden state of each row's last token, (B, D)."""
    counts = np.array([len(t) for t in tokens])
    ends = counts.cumsum()
    slots = np.arange(ends[-1]) + np.repeat(lengths[rows] - (ends - counts), counts)
    to = lambda a: torch.from_numpy(np.ascontiguousarray(a)).to(policy.cos.device)
    h = policy.extend(to(np.concatenate([np.asarray(t, np.int64) for t in tokens])), to(np.repeat(rows, counts)), to(slots), cache)
    lengths[rows] += counts
    return h[to(ends - 1)]


def sample_tokens(policy, h, names, temperature, allowed=None, last=END):
    """Sample one action token a row, given hidden states h (B, D). -> ids (B,), log-probabilities (B,) at this temperature, in numpy.

    names (k, B): integers that name each row's random number. allowed: a set of ids a row, or all. last: as in `action_logprobs`.
    """
    logp = action_logprobs(policy.logits(h), temperature, last)  # (B, V)
    if allowed is not None:
        logp = constrain(logp, allowed)
    if temperature == 0:
        chosen = logp.argmax(-1)
    else:
        u = torch.from_numpy(uniform(*names)).to(logp.device)
        cdf = logp.double().exp().cumsum(-1)
        chosen = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)[:, 0]
    return chosen.cpu().numpy(), logp.gather(-1, chosen[:, None])[:, 0].double().cpu().numpy()


def sample_actions(policy, cache, lengths, h, names, temperature, n=1, last=END, most=MAX_ACTION):
    """Sample n actions in each of the B rows of the cache, given the hidden states h (B, D) of the <act> before; names (k, B·n) as above.

    -> ids of each sample (ending in <end>), their summed log-probabilities, and whether the <end> had to be forced. With n = 1 the
    cache gets all but the <end>. Samples of a row share a cache row for as long as they read the same, which at low temperatures is
    long. With last=ACT what is sampled is the world's answer to an action; `most`: tokens, the last included.
    """
    actions, logps = [[] for _ in names[0]], np.zeros(len(names[0]))
    going, row = np.arange(len(actions)), np.repeat(np.arange(len(lengths)), n)  # samples without an end; the cache row of each sample
    at = row.copy()  # and its place in h
    for token in range(most - 1):
        chosen, logp = sample_tokens(policy, h[torch.from_numpy(at[going]).to(h.device)], (*names[:, going], token), temperature, last=last)
        logps[going] += logp
        for j, c in zip(going, chosen.tolist()):
            actions[j].append(c)
        on = chosen != last
        going, chosen = going[on], chosen[on]
        if not len(going):
            break
        # samples of one cache row that drew the same token go on sharing it; those that drew different ones part here
        V = policy.config.vocab_size
        different, at[going] = np.unique(row[going] * V + chosen, return_inverse=True)  # distinct (cache row, token)
        rows, tokens = divmod(different, V)
        if (rows[1:] == rows[:-1]).any():  # a row goes on in more than one way: a copy for each
            cache, lengths = cache.take(rows), lengths[rows]
            row[going], rows = at[going], np.arange(len(rows))
        h = feed(policy, cache, rows, lengths, tokens[:, None])
    forced = np.zeros(len(actions), dtype=bool)
    forced[going] = True
    for j in going:
        actions[j].append(last)
    return actions, logps, forced


def branch(policy, cache, owner, lengths, h, n, names, temperature):
    """Sample n actions at each of B states without touching their cache: state j is the first lengths[j] places of row owner[j].

    h (B, D) and names (k, B) as in `sample_actions`. -> B lists of n (action ids, log-probability, forced).
    """
    names = np.vstack([np.repeat(names, n, axis=1), np.tile(np.arange(n), len(owner))])
    copy = copied_rows(policy, cache, owner, int(lengths.max()))
    drawn = list(zip(*sample_actions(policy, copy, lengths.copy(), h, names, temperature, n)))
    return [drawn[i:i + n] for i in range(0, len(drawn), n)]


def copied_rows(model, cache, owner, length):
    """A copy of the first `length` places of cache rows `owner`, with room for an action."""
    rows = torch.from_numpy(owner).to(model.cos.device)
    copy = Cache(model.config, len(rows), length + MAX_ACTION, model.cos.device)
    copy.k[:, :, :, :length], copy.v[:, :, :, :length] = cache.k[:, rows, :, :length], cache.v[:, rows, :, :length]
    return copy


def action_logprobs(logits, temperature, last=END):
    """Log-probabilities of the next action token: at the sampling temperature, special tokens other than `last`, which ends it, masked."""
    logits = logits.float().clone()
    logits[..., [i for i in range(len(SPECIAL)) if i != last]] = -torch.inf
    return torch.log_softmax(logits / (temperature or 1.0), dim=-1)


def continuations(tokenizer, commands, begun):
    """The ids that continue an action so that it can still become one of the commands."""
    actions = [tokenizer.action(c) for c in commands]
    return {a[len(begun)] for a in actions if list(a[:len(begun)]) == begun}


def constrain(logp, allowed):
    """Renormalise each row of logp (B, V) on its set of allowed ids."""
    mask = torch.full_like(logp, -torch.inf)
    for row, ids in zip(mask, allowed):
        row[list(ids)] = 0.0
    return torch.log_softmax(logp + mask, dim=-1)
