"""AgentPRM on ALFWorld, from games to a table of π_0 … π_3.

    python train.py --iters 3 --rollouts 70000             # the whole method; it prints an estimate first
    python train.py --iters 3 --rollouts 4000              # a small one
    python train.py --smoke                                # every stage, tiny, on generated games
    torchrun --nproc_per_node=2 train.py --iters 3 --rollouts 70000    # the same on several GPUs, or machines that share the disk of --out

One iteration i: roll out π_{i−1} → Monte Carlo labels Q̂ → train the PRM Q_i, which has first been taught to check → improve π_{i−1} to π_i by
online DPO and imitation of what won. `python experiments.py as-published` has the flags that leave the paper's method alone.
The same command on an existing --out goes on where it stopped, after Ctrl-C, a kill or a power cut.
"""

import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

import ranks
from checks import check_loss, expert_preferred, train_checks
from common import RESUMED, UserError, changes, command_line, generator, key, read_json, read_model, save_model, set_up_torch
from credit import TOGETHER, imitated, judged_by, opinions, worth
from detours import with_detour
from dpo import as_it_was, online_dpo
from eval import evaluate_policy
from expert import fit_prior
from flags import OF_DEMONSTRATIONS, episodes_of_each_game, origin, parse_flags
from games import same_games, task_folder
from inverse_prm import Ends, rest_odds, told_apart, train_inverse_prm
from model import Config
from prm import actions_of, fit_labels, prefer, promise_and_progress, report, score, states_of, train_prm
from qestimate import (forked, forks_of, held_out_check, history_keys, labels_of, preference_pairs, q_table, returns, sarsa, shaped, squashed,
                       state_labels, td_gae, visit_statistics, world_keys)
from rollout import FROM_DEMONSTRATION, rollout
from runs import Run, estimate, final_table, load_games
from sft import train_sft, train_tokenizer, untrained
from shards import play_shards, rollouts_in, sampled_tokens
from tellings import expert_trajectories, hinted, receptacle_types, teller, without_hint
from tokenizer import Tokenizer, split_intro


def main():
    args = parse_flags(doc=__doc__)
    ranks.join(args.out, args.device)
    set_up_torch(args.threads)
    run = Run(args)
    games = load_games(args, run)  # .train, .dev, .test {split: games}, .by_id
    estimate(args, run, games)
    supervised(args, run, games)
    evaluate(args, run, games, 0)
    if args.shape_with:
        reference_value(args, run)
    for i in range(1, args.iters + 1):
        trajectories = roll_out(args, run, games, i)
        if args.forks:
            fork(args, run, games, i, trajectories)
        if args.checks:
            check(args, run, games, i, trajectories)
        for name in prm_names(args):
            process_reward_model(args, run, games, i, trajectories, name)
        improve(args, run, games, i, trajectories)
        evaluate(args, run, games, i)
    final_table(args, run)
    ranks.leave()


def supervised(args, run, games):
    """π_0: fine-tuned on demonstrations, or given by --init."""
    with run.stage("iter0/sft") as stage:
        if stage.done:
            return
        if args.init:
            policy, tokenizer = read_model(args.init, run.device)
            log, (theirs, data) = [], origin(args.init)
            if not same_games(data.get("train", games.source), games.source):
                raise UserError(f"--init {args.init}: its run had other games ({data['train']}; now {games.source}), "
                                "so it may have been trained on what is held out here")
            if differ := changes({**vars(args), **theirs}, vars(args), OF_DEMONSTRATIONS):
                print(f"warning: demonstrations are made anew, and not those of --init ({'; '.join(differ)})", file=sys.stderr)
        else:
            prior = fit_prior(games.train)
            tokenizer = train_tokenizer(games.train, prior, args.seed)
            policy = untrained(Config(len(tokenizer), args.dim, args.layers, args.heads, args.kv_heads, args.hidden, args.context),
                               args.seed).to(run.device)
            log = train_sft(policy, tokenizer, games.train, prior, demos=args.demos, updates=args.sft_updates, glanced=args.glances,
                            searched=args.searches, lr=args.sft_lr, weight_decay=args.sft_weight_decay, batch=args.sft_batch, seed=args.seed,
                            mistakes=args.mistakes, obs_weight=args.obs_weight, max_steps=args.max_steps, exchange=args.exchange,
                            detours=args.detours, sparse=args.sparse, steer=args.steer, noise=args.demo_noise, own_names=args.own_names,
                            state=stage.state)
        save_model(run.path / "iter0/policy", policy, tokenizer)
        stage.finish({"parameters": policy.n_parameters(), "log": log})


def roll_out(args, run, games, i):
    """Stage 1a: --rollouts episodes of π_{i−1}, shard by shard. -> all trajectories"""
    with run.stage(f"iter{i}/rollouts") as stage:
        order = generator(args.seed, "games", i).permutation(len(games.train))
        each = episodes_of_each_game(args)
        todo = [(games.train[order[g % len(order)]], g // len(order) * each + k)
                for g in range(-(-args.rollouts // each)) for k in range(each)][:args.rollouts]
        if args.reset_frac or args.steer:
            todo = explore(args, run, games, i, todo)
        play_episodes(args, run, stage, i, "rollouts", todo)
        trajectories = stored_rollouts(args, run, i)
        if not stage.done:
            actions = sum(map(len, trajectories))
            plain = [t.won for t in trajectories if t.episode < FROM_DEMONSTRATION]
            stage.finish({"episodes": len(trajectories), "success": sum(plain) / len(plain) if plain else None,
                          "begun_in_demonstrations": len(trajectories) - len(plain), "mean_actions": actions / len(trajectories),
                          "inadmissible": float(sum(t.inadmissible.sum() for t in trajectories) / actions),
                          "sampled_tokens": sampled_tokens(trajectories),
                          "q_hat_check": held_out_check(trajectories, Tokenizer.load(run.path / f"iter{i - 1}/policy"), args.gamma)})
        return trajectories


def play_episodes(args, run, stage, i, name, todo):
    """Play the episodes `todo` with π_{i−1}, in shards that lie in iter<i>/<name>."""
    shards = [(run.path / f"iter{i}/{name}/{n:05d}.safetensors", todo[start:start + args.shard])
              for n, start in enumerate(range(0, len(todo), args.shard))]
    if not ranks.first_says(all(file.exists() for file, _ in shards)):
        with tqdm(total=sum(len(episodes) for _, episodes in ranks.mine(shards)), desc=f"{name} {i}", unit="episode", dynamic_ncols=True) as bar:
            for ended, won, stage.workers_memory in play_shards(
                    ranks.mine(shards), run.path / f"iter{i - 1}/policy", run.device, run.workers, temperature=args.rollout_temperature,
                    seed=key(f"{name} {args.seed} {i}"), slots=args.slots, max_steps=args.max_steps):
                bar.update(ended - bar.n)
                bar.set_postfix(won=f"{won / max(1, ended):.1%}", refresh=False)
    ranks.wait()


def fork(args, run, games, i, trajectories):
    """Stage 1b, with --forks: rollouts forked behind every action of the others, in the order of `forks_of`."""
    with run.stage(f"iter{i}/forks") as stage:
        todo = [(games.by_id[trajectories[j].game], n, trajectories[j].ids[:trajectories[j].spans[k + 1, 0]], k + 1)
                for n, (j, k) in enumerate(forks_of(trajectories, args.forks))]
        play_episodes(args, run, stage, i, "forks", todo)
        if not stage.done:
            forks = forks_in(run, i)
            stage.finish({"episodes": len(forks), "success": float(np.mean([t.won for t in forks])), "sampled_tokens": sampled_tokens(forks)})


def forks_in(run, i):
    """The forks of an iteration, in the order of `forks_of`."""
    return sorted(rollouts_in(run.path / f"iter{i}", "forks"), key=lambda t: t.episode)


def explore(args, run, games, i, todo):
    """Let a share of the episodes begin at a random state of a random demonstration (P1, reset distribution), or be told a strategy (P1, steered)."""
    tokenizer = Tokenizer.load(run.path / f"iter{i - 1}/policy")
    demos = [demo for demo, _ in demonstrations(args, games, tokenizer)] if args.reset_frac else []
    out = []
    for n, (game, number) in enumerate(todo):
        rng = generator(args.seed, "explore", i, n)
        chance = rng.random()
        if chance < args.reset_frac:
            demo = demos[rng.integers(len(demos))]
            out.append((games.by_id[demo.game], FROM_DEMONSTRATION + n, demo.ids[:demo.spans[rng.integers(len(demo)), 0]]))
        elif chance < args.reset_frac + args.steer:
            out.append((game, number, np.array(tokenizer.prompt(*split_intro(hinted(game.intro, rng.choice(receptacle_types(game))))), np.int32)))
        else:
            out.append((game, number))
    return out


def stored_rollouts(args, run, i):
    """The rollouts of π_{i−1}, as if none had been steered."""
    trajectories = rollouts_in(run.path / f"iter{i}")
    if not args.steer:
        return trajectories
    tokenizer = Tokenizer.load(run.path / f"iter{i - 1}/policy")
    return [without_hint(t, tokenizer) for t in trajectories]


def held_out(args, trajectories):
    """Task folders of the rollouts, of which no PRM sees a rollout, or in its own lessons a demonstration: a share of --held-out, at least one.

    In every iteration the same, as far as they are played: what Q_1 has learned from, π_1 has imitated and Q_2 starts from. Stage 3 uses all
    rollouts, so from the second iteration on the policy that a PRM starts from has imitated won ones of these folders too: its report card is about
    new rollouts, not new games.
    """
    folders = sorted({task_folder(t.game) for t in trajectories}, key=lambda folder: key(f"held out {args.seed} {folder}"))
    if len(folders) < 2:
        raise UserError(f"all rollouts are of {folders[0]}, and some must be held out of the PRM's lessons: --rollouts or --min-games for more games")
    return set(folders[:max(1, min(round(args.held_out * len(folders)), len(folders) - 1))])


def check(args, run, games, i, trajectories):
    """Stage 2a: π_{i−1}'s weights learn to check actions, from its demonstrations; every PRM of the iteration starts from them."""
    with run.stage(f"iter{i}/checks") as stage:
        if stage.done:
            return
        policy, tokenizer = read_model(run.path / f"iter{i - 1}/policy", run.device)
        prm, held = policy.with_score_head(), held_out(args, trajectories)
        demos = [(t, taught) for t, taught in demonstrations(args, games, tokenizer) if task_folder(t.game) not in held]
        if not demos:
            raise UserError("all demonstrations are of task folders held out of the PRM's lessons: more --demos, less --held-out, or --checks 0")
        log = train_checks(prm, tokenizer, demos, teller(games.train, tokenizer, args.exchange), updates=args.checks, lr=args.prm_lr,
                           batch=args.check_batch, seed=key(f"checks {args.seed} {i}"), state=stage.state, name=f"checks {i}")
        save_model(run.path / f"iter{i}/checks", prm, tokenizer)
        stage.finish({"log": log})


def process_reward_model(args, run, games, i, trajectories, name):
    """Stage 2b: Q_i starts from π_{i−1}, or from what it has become by checks, and learns from the rollouts;
    its report card is of rollouts held out by task folder."""
    with run.stage(f"iter{i}/{name}") as stage:
        if stage.done:
            return
        policy, tokenizer = read_model(run.path / f"iter{i - 1}/policy", run.device)
        start = read_model(run.path / f"iter{i}/checks", run.device, "score")[0] if args.checks else policy
        prm = start.with_score_head("relative" if args.prm_loss == "bt" or args.algo == "inverseprm" else "score")
        held = held_out(args, trajectories)
        test = [t for t in trajectories if task_folder(t.game) in held]
        keys = history_keys if args.state == "history" else lambda t, tokenizer: world_keys(t, tokenizer, games.by_id[t.game])
        learn = learn_from_demonstrations if args.algo == "inverseprm" else learn_from_returns
        learned = learn(args, run, games, i, trajectories, held, prm, policy, tokenizer, keys, lr=args.prm_lr, batch=args.prm_batch,
                        obs_weight=args.prm_obs_weight, seed=key(f"{name} {args.seed} {i}"), state=stage.state, name=f"{name.upper()} {i}")
        save_model(run.path / f"iter{i}/{name}", prm, tokenizer)
        table = q_table(test, tokenizer, args.gamma, keys)
        card = report(prm, test, labels_of(test, table), table, preference_pairs(test, table, args.delta)[0],
                      ranks_alone=bool(args.shape_with or args.curiosity))
        stage.finish({"held_out": card, "expert_preferred": expert_preferred(prm, policy, tokenizer, games.train, games.dev, seed=args.seed,
                                                                                  max_steps=args.max_steps, context=args.context), **learned})


def learn_from_returns(args, run, games, i, trajectories, held, prm, policy, tokenizer, keys, **options):
    """AgentPRM (P1, section 2): Q near the labels of the rollouts in other task folders than `held`. -> what there is to tell"""
    fit = [t for t in trajectories if task_folder(t.game) not in held]
    table = q_table(fit, tokenizer, args.gamma, keys)
    labels, (pairs, preferences) = labels_of(fit, table), preference_pairs(fit, table, args.delta)
    if args.forks:
        labels = [label for t, label in zip(trajectories, forked(trajectories, forks_in(run, i), args.forks, args.gamma))
                  if task_folder(t.game) not in held]
    value = fit_labels(state_labels(fit, table), states_of(fit)) if args.prm_loss == "bce" else None
    log = train_prm(prm, fit, objective(args, run, fit, labels, pairs), teller(games.train, tokenizer, args.exchange),
                    epochs=args.prm_epochs, value=value, **options)
    return {"visits": visit_statistics(table), "preferences": preferences, "log": log}


def learn_from_demonstrations(args, run, games, i, trajectories, held, prm, policy, tokenizer, keys, **options):
    """InversePRM (P1, section 3): f tells the expert from all learner policies so far, in other task folders than `held`. -> what there is to tell"""
    apart = lambda some: [[one for one in some if (task_folder(one[0].game) in held) == out] for out in (False, True)]  # to learn from, and held out
    (shown, expert), (fit, learner) = apart(demonstrations(args, games, tokenizer)), apart([(t, None) for t in trajectories])
    earlier, _ = apart([(t, None) for j in range(1, i) for t in stored_rollouts(args, run, j)])
    negatives = [t for t, _ in earlier + fit]
    ends = Ends(args.gamma, args.hide_ends, rest_odds(shown, negatives, args.max_steps) if args.rest else None)
    tell = teller(games.train, tokenizer, args.exchange)
    check_too = lambda step: check_loss(prm, tokenizer, shown, tell, args.check_batch, generator(options["seed"], "check", step))
    log = train_inverse_prm(prm, policy, shown, negatives, tell, ends, updates=args.inverse_updates, temperature=args.rollout_temperature,
                            check=check_too if args.checks else None, **options)
    sides = ([(*one, f) for one, f in zip(side, score(prm, [t for t, _ in side]))] for side in (expert, learner))
    return {"told_apart": told_apart(*sides, ends), "rest": ends.rest,
            "visits": visit_statistics(q_table([t for t, _ in fit], tokenizer, args.gamma, keys)), "log": log}


def prm_names(args):
    """Folders of an iteration's PRMs: one, or --ensemble of them that differ in the order of their lessons."""
    return ["prm", *(f"prm{k}" for k in range(2, args.ensemble + 1))]


def objective(args, run, trajectories, labels, pairs):
    """What --prm-loss, --targets, --shape-with and --curiosity ask of Q, with Monte Carlo labels or preferences at hand."""
    if args.shape_with:
        reference, _ = read_model(run.path / "iter0/value", run.device, "score")
        q_hat = squashed(np.concatenate([shaped(q, V, args.gamma, args.shape)
                                         for (q, _), [V] in zip(labels, opinions([reference], trajectories, states_of))]))
        labels = list(zip(np.split(q_hat.astype(np.float32), np.cumsum([len(t) for t in trajectories])[:-1]), [weight for _, weight in labels]))
    if args.curiosity:
        labels = [(np.minimum(1, q_hat + args.curiosity * np.sqrt(weight)), weight) for q_hat, weight in labels]  # weight: 1 / visits
    if args.prm_loss == "bt":
        if not any(pairs):
            print("warning: nowhere among the rollouts are two actions of one state more than --delta apart, so --prm-loss bt has nothing to "
                  "compare; play more of each game (--min-games 250)", file=sys.stderr)
        return prefer(trajectories, pairs)
    if args.prm_loss == "promise-progress":
        targets = {"mc": lambda i, M: (labels[i][0], np.diff(labels[i][0], prepend=0)),
                   "td-gae": lambda i, M: td_gae(M, 0, trajectories[i].reward, args.gamma, args.gae_lambda),  # M_{−1} cancels in Q̂_0
                   "sarsa": lambda i, M: sarsa(M, 0, trajectories[i].reward, args.gamma, args.gae_lambda)}
        return promise_and_progress(trajectories, targets[args.targets], args.progress_weight)
    return fit_labels(labels, actions_of(trajectories))


def reference_value(args, run):
    """V^μ for --shape-with: the states' values by the PRM in that folder; μ is the policy whose rollouts it has learned from."""
    with run.stage("iter0/value") as stage:
        if stage.done:
            return
        prm, tokenizer = read_model(Path(args.shape_with) / "prm", run.device, "score")
        if tokenizer.tokens != Tokenizer.load(run.path / "iter0/policy").tokens:
            raise UserError(f"--shape-with {args.shape_with}: another vocabulary than this run's; start from the same π_0 (--init)")
        save_model(run.path / "iter0/value", prm, tokenizer)
        stage.finish({})


def demonstrations(args, games, tokenizer):
    """Those that π_0 was trained on (one of --init, if its run had the same --demos, --mistakes, --demo-noise and --seed).
    -> [(Trajectory, taught (T,) bool)]"""
    return expert_trajectories(games.train, fit_prior(games.train), tokenizer, demos=args.demos, seed=args.seed, mistakes=args.mistakes,
                               max_steps=args.max_steps, noise=args.demo_noise, context=args.context)


def improve(args, run, games, i, trajectories):
    """Stage 3: online DPO from π_{i−1}, judged by Q_i, held near π_{i−1} (or π_0: --ref init),
    at states of all rollouts so far (--states-of last: of π_{i−1}'s)."""
    with run.stage(f"iter{i}/dpo") as stage:
        if stage.done:
            return
        policy, tokenizer = read_model(run.path / f"iter{i - 1}/policy", run.device)
        reference, _ = read_model(run.path / f"iter{i - 1 if args.ref == 'prev' else 0}/policy", run.device)
        prms = [read_model(run.path / f"iter{i}/{name}", run.device, "score")[0] for name in prm_names(args)]
        earlier = [t for j in range(1, i) for t in stored_rollouts(args, run, j)] if args.states_of == "all" else []
        ends = Ends(args.gamma, args.hide_ends, read_json(run.path / f"iter{i}/prm.json").get("rest"))

        def weigh(some):
            """What of the rollouts is imitated, and unlearned, token by token."""
            gains = worth(prms, some, args.imitate_by, how=args.ensemble_by, prm_loss=args.prm_loss, ends=ends)
            return [imitated(t, gain, args.obs_weight, args.unlearn) for t, gain in zip(some, gains)]

        def stray(t, weights, rng):
            """A share of what is imitated is told with a detour."""
            if weights.any() and rng.random() < args.imitate_detours:
                return with_detour(t, weights, games.by_id[t.game], tokenizer, rng, args.context)
            return as_it_was(t, weights, rng)

        def watch():
            """Does Q still mean success? Both, on the dev games, of the policy as it is now;
            Q's mean and that of the returns it stands for, over the same actions."""
            played = list(rollout(policy, tokenizer, [(game, 0) for game in games.dev], temperature=args.eval_temperature,
                                  max_steps=args.max_steps, seed=args.seed, slots=args.slots))
            q = np.concatenate(opinions(prms, played), axis=1)  # (K, actions)
            return {"true/success": float(np.mean([t.won for t in played])), "true/actions": float(np.mean([len(t) for t in played])),
                    "true/return": float(np.concatenate([returns(t, args.gamma) for t in played]).mean()),
                    "prm/q": float(TOGETHER[args.ensemble_by](q).mean()), "prm/disagreement": float(q.std(0).mean())}

        log = online_dpo(policy, reference, judged_by(prms, args.ensemble_by), tokenizer, earlier + trajectories,
                         teller(games.train, tokenizer, args.exchange), pairs=args.pairs, beta=args.beta, lr=args.dpo_lr,
                         temperature=args.dpo_temperature, proposals=args.proposals, seed=key(f"dpo {args.seed} {i}"), state=stage.state,
                         trunks=args.dpo_batch, states_per_trunk=args.states_per_trajectory, min_gap=args.min_gap, imitate=args.imitate,
                         weigh=weigh, stray=stray, averaged=args.average, watch=watch if args.track_hacking else None, name=f"DPO {i}")
        save_model(run.path / f"iter{i}/policy", policy, tokenizer)
        stage.finish({"log": log})


def evaluate(args, run, games, i):
    """Success of π_i, on dev and on the test splits."""
    for split, played, each in (("dev", games.dev, args.dev_episodes),
                                *((split, test, args.episodes_per_game) for split, test in games.test.items())):
        with run.stage(f"iter{i}/eval-{split}") as stage:
            if not stage.done:
                policy, tokenizer = read_model(run.path / f"iter{i}/policy", run.device)
                result = evaluate_policy(policy, tokenizer, played, episodes_per_game=each, slots=args.slots, temperature=args.eval_temperature,
                                         max_steps=args.max_steps, seed=args.seed, name=f"π_{i} on {split}")
                stage.finish({"split": split, **result})
                if ranks.rank() == 0:
                    print(f"π_{i} wins {result['success']:.1%} of {split}, in {result['mean_actions']:.1f} actions", file=sys.stderr)


if __name__ == "__main__":
    command_line(main, RESUMED)
