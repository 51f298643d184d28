"""Success by split and task type, for any agent, as a table and as JSON.

    python eval.py --policy runs/default/best/policy --split valid_seen --episodes-per-game 5
    python eval.py --policy runs/default/iter0/policy --prm runs/default/iter1/prm --best-of 16
    python eval.py --policy DIR --prm DIR --act-beta 0.1              # act by π(a|s) · exp(Q(s,a)/β)
    python eval.py --policy DIR --prm DIR --best-of 16 --lookahead 1  # by imagined futures
    python eval.py --policy DIR --prm DIR --beam 4x4
    python eval.py --policy DIR --prm DIR --best-of-episodes 16
    python eval.py --policy DIR --prm DIR --watch    # one episode: π(a|s) and Q(s,a) at each step
    python eval.py --agent expert --split valid_seen                  # baselines: expert, random
    python eval.py --agent human                                      # play yourself
    python eval.py --policy DIR --engine both        # the same episodes in alfworld's own engine
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from candidates import score_states, tree_builder
from fast_alfworld import (GAMES, TASK_TYPES, AlfworldEnv, Expert, Game, demonstrate, fit_prior,
                           games_for, generate, split_dev, write_games)
from fast_alfworld.reference import ReferenceEnv
from rollout import Episode, replay, rollout, sample, slots_for
from run import provenance
from search import (beam_search, best_episodes, best_of_n, last_scores, look_ahead, read_prm,
                    tilted)
from tokenizer import split_intro
from utils import (Parser, UserError, a_seed, a_temperature, at_least_one, between, command_line,
                   generator, pick_device, read_json, read_model, set_up_torch, write_json)

# --- statistics ----------------------------------------------------------------------------------


def summarise(episodes, games):
    """Success, its 95 % interval and mean actions (over all episodes), in all and by task type.

    episodes: list of {"game", "won", "actions"}. -> {"games", "success", "interval",
    "mean_actions", "by_task": {task type: the same}}
    """
    type_of = {game.id: game.task_type for game in games}

    def share(part):
        return {"games": len({e["game"] for e in part}),
                "success": float(np.mean([e["won"] for e in part])),
                "interval": interval(list(by_game(part).values())),
                "mean_actions": float(np.mean([e["actions"] for e in part]))}

    by_task = {t: [e for e in episodes if type_of[e["game"]] == t] for t in TASK_TYPES}
    return {**share(episodes), "by_task": {t: share(part) for t, part in by_task.items() if part}}


def by_game(episodes):
    """-> {game: share of its episodes that were won}, in order of game"""
    won = {}
    for e in sorted(episodes, key=lambda e: e["game"]):
        won.setdefault(e["game"], []).append(e["won"])
    return {game: float(np.mean(w)) for game, w in won.items()}


def interval(values, n=10_000, seed=0):
    """95 % interval of the mean of a value per game: bootstrap, resampling games. -> [low, high]"""
    values = np.asarray(values, float)
    resampled = np.random.default_rng(seed).integers(len(values), size=(n, len(values)))
    return np.quantile(values[resampled].mean(1), (0.025, 0.975)).tolist()


def paired_bootstrap(before, after):
    """Two lists of episodes on the same games -> (mean gain in success, low, high), 95 %."""
    a, b = by_game(before), by_game(after)
    if a.keys() != b.keys():
        raise ValueError("a paired bootstrap needs the same games on both sides")
    gain = [b[game] - a[game] for game in a]
    return float(np.mean(gain)), *interval(gain)


def table(result):
    """A result of `evaluate_*` -> lines of text."""
    lines = [f"{'task type':34}{'games':>7}{'success':>9}{'95 % interval':>18}{'actions':>9}"]
    for name, r in (*result["by_task"].items(), ("all", result)):
        low, high = r["interval"]
        lines.append(f"{name:34}{r['games']:7}{r['success']:9.1%}{low:9.1%} …{high:7.1%}"
                     f"{r['mean_actions']:9.2f}")
    return lines


# --- playing many games --------------------------------------------------------------------------

def play(player, games, episodes_per_game, name):
    """All that player(list of Episode) yields, `rollout` or another, with a progress bar."""
    todo = [Episode(game, k) for game in games for k in range(episodes_per_game)]
    return list(tqdm(player(todo), name, len(todo), unit="episode", dynamic_ncols=True))


def result_of(trajectories, games):
    """`summarise`, the share of inadmissible actions, and the episodes in order."""
    done = sorted(trajectories, key=lambda t: (t.game, t.episode))
    episodes = [{"game": t.game, "won": bool(t.won), "actions": len(t)} for t in done]
    inadmissible = float(np.mean(np.concatenate([t.choice for t in done]) < 0))
    return {**summarise(episodes, games), "inadmissible": inadmissible, "episodes": episodes}


def evaluate_policy(policy, tokenizer, games, *, episodes_per_game=1, name="evaluate", **options):
    """Play every game `episodes_per_game` times. options: those of `rollout` (temperature,
    max_steps, seed, slots, act, prm, free, make_env). -> `result_of`"""
    return result_of(play(lambda todo: rollout(policy, tokenizer, todo, **options),
                          games, episodes_per_game, name), games)


def evaluate_beams(policy, prm, tokenizer, games, size, *, episodes_per_game=1, **options):
    """The same for `beam_search`; size: (keep, expand). `world_actions`: actions taken in the
    world, mean of an episode."""
    found = play(lambda todo: beam_search(policy, prm, tokenizer, todo, *size, **options),
                 games, episodes_per_game, "beam {}x{}".format(*size))
    return {**result_of([t for t, _ in found], games),
            "world_actions": float(np.mean([tried for _, tried in found]))}


def evaluate_best_episodes(policy, prm, tokenizer, games, n, *, episodes_per_game=1, **options):
    """The same for Best-of-n over whole episodes. For comparison, `plain`: success and actions of
    all the rollouts; `oracle`: share of choices in which one of the n was won (pass@n)."""
    played = play(lambda todo: rollout(policy, tokenizer, todo, **options),
                  games, episodes_per_game * n, f"best of {n} episodes")
    groups = {}
    for t in played:
        groups.setdefault((t.game, t.episode // n), []).append(t.won)
    plain = {"success": float(np.mean([t.won for t in played])),
             "mean_actions": float(np.mean([len(t) for t in played]))}
    return {**result_of(best_episodes(played, last_scores(prm, played), n), games),
            "plain": plain, "oracle": float(np.mean([any(won) for won in groups.values()]))}


def evaluate_scripted(agent, games, *, prior=None, episodes_per_game=1, max_steps=30, seed=0,
                      make_env=AlfworldEnv):
    """The same for "expert", or "random": uniform over the candidates."""
    env, episodes = make_env(max_steps), []
    for game in tqdm(games, agent, unit="game", dynamic_ncols=True):
        for k in range(episodes_per_game):
            rng = generator(seed, agent, game.id, k)
            if agent == "expert":
                demo = demonstrate(env, game, Expert(prior), rng, max_steps=max_steps)
                won, actions = demo.won, len(demo.steps)
            else:
                _, info = env.reset(game)
                won, actions = False, 0
                while not won and actions < max_steps:
                    commands = info["admissible_commands"]
                    _, _, won, _, info = env.step(commands[rng.integers(len(commands))])
                    actions += 1
            episodes.append({"game": game.id, "won": bool(won), "actions": actions})
    return {**summarise(episodes, games), "inadmissible": 0.0, "episodes": episodes}


# --- one episode, to be looked at ----------------------------------------------------------------

@torch.no_grad()
def explain(game, trajectory, policy, tokenizer, temperature, prm=None):
    """An episode as a dict. Each step has all candidates with π(a|s) and, with a PRM, Q(s,a),
    the most likely first: {"action", "answer", "admissible", "candidates": [{"action", "pi", "q"}]}
    """
    env, tree_of = AlfworldEnv(len(trajectory)), tree_builder(tokenizer)
    candidates = replay(trajectory, game, tokenizer)
    states = [(0, start, tree_of(commands))
              for start, commands in zip(trajectory.spans[:, 0].tolist(), candidates)]
    pi = score_states(policy, [trajectory.ids], states, temperature).exp().tolist()
    q = score_states(prm, [trajectory.ids], states).sigmoid().tolist() if prm else None
    task, observation = split_intro(env.reset(game)[0])
    steps = []
    for t, action in enumerate(tokenizer.actions(trajectory.ids)):
        options = [{"action": c, "pi": pi[t][i], "q": q[t][i] if prm else None}
                   for i, c in enumerate(candidates[t])]
        steps.append({"action": action, "answer": env.step(action)[0],
                      "admissible": bool(trajectory.choice[t] >= 0),
                      "candidates": sorted(options, key=lambda o: -o["pi"])})
    return {"game": game.id, "task_type": game.task_type, "won": bool(trajectory.won),
            "task": task, "observation": observation, "steps": steps}


def narrate(episode, shown=6):
    """What `explain` returns -> lines of text, with the `shown` most likely candidates a step."""
    yield from (episode["game"], episode["observation"], f"Your task is to: {episode['task']}")
    for n, step in enumerate(episode["steps"], 1):
        yield f"\n{n:2} > {step['action']}" + "  (not admissible)" * (not step["admissible"])
        for rank, o in enumerate(step["candidates"]):
            if rank < shown or o["action"] == step["action"]:
                mark = ">" if o["action"] == step["action"] else " "
                yield (f"   {mark} {o['action']:44} π {o['pi']:.3f}"
                       + ("" if o["q"] is None else f"   Q {o['q']:.3f}"))
        yield step["answer"]
    yield f"\n{'won' if episode['won'] else 'not won'} after {len(episode['steps'])} actions"


def play_by_hand(games, *, max_steps, seed, make_env=AlfworldEnv):
    """A person plays the games in random order until `quit`, Ctrl-C or the end of input.

    -> list of {"game", "won", "actions"} of the games played to the end
    """
    env, episodes = make_env(max_steps), []
    print("? lists the candidates, quit ends")
    for g in generator(seed, "by hand").permutation(len(games)):
        observation, info = env.reset(games[g])
        actions, won, truncated = 0, False, False
        print(f"\n{observation}")
        while not (won or truncated):
            try:
                action = input(f"{actions + 1:2} > ").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return episodes
            if action.lower() in ("quit", "exit"):
                return episodes
            if action in ("?", ""):
                print(*info["admissible_commands"], sep="\n")
                continue
            observation, _, won, truncated, info = env.step(action)
            actions += 1
            print(observation)
        print(f"{'won' if won else 'not won'} after {actions} actions")
        episodes.append({"game": games[g].id, "won": bool(won), "actions": actions})
    return episodes


# --- command line --------------------------------------------------------------------------------

def parse():
    """The command line -> namespace"""
    parser = Parser(__doc__)
    who = parser.add_argument_group("agent").add_argument
    who("--agent", help="who plays", default="policy",
        choices=("policy", "expert", "random", "human"))
    who("--policy", help="folder of a policy", metavar="DIR")
    who("--prm", help="folder of a PRM, for the flags that follow", metavar="DIR")
    who("--best-of", help="sample N actions a step, take the one of highest Q",
        type=between(1, 1024, int), default=1, metavar="N")
    who("--act-beta", help="sample actions from π(a|s) · exp(Q(s,a)/X)", type=between(1e-4),
        metavar="X")
    who("--lookahead", help="with --best-of: compare by the Q of what the policy imagines after "
        "each action, D answers and D actions", type=between(0, 50, int), default=0, metavar="D")
    who("--beam", help="step-level beam search: keep K histories, sample M actions of each",
        type=keep_by_expand, metavar="KxM")
    who("--best-of-episodes", help="play each episode N times, take the one whose last action has "
        "the highest Q", type=between(1, 1024, int), default=1, metavar="N")
    who("--temperature", help="of the policy; 0 is greedy", type=a_temperature, default=0.3,
        metavar="X")
    who("--actions", help="choose among the candidates, or generate free text",
        default="candidates", choices=("candidates", "free"))
    who("--watch", help="play one game, chosen by --seed, and print it step by step with the most "
        "likely candidates, π(a|s) and, with --prm, Q(s,a)", action="store_true")
    what = parser.add_argument_group("games").add_argument
    what("--split", help="train, valid_seen, valid_unseen, or dev: 200 train games held out by "
         "task folder, the same for every policy", default="valid_seen", metavar="NAME")
    what("--games", help="published (alfworld), generated or tiny games; auto: published if found",
         default="auto", choices=GAMES)
    what("--data", help="folder of the published games (default: $ALFWORLD_DATA, then "
         "~/.cache/alfworld)", metavar="DIR")
    what("--n-generated", help="size of a split of generated games", type=at_least_one,
         default=1000, metavar="N")
    what("--episodes-per-game", help="episodes a game", type=at_least_one, default=1, metavar="N")
    what("--max-steps", help="actions after which an episode is cut", type=at_least_one,
         default=30, metavar="N")
    what("--engine", help="the fast exact engine, alfworld's own, or both in turn, which counts "
         "equal episodes", default="fast", choices=("fast", "alfworld", "both"))
    run = parser.add_argument_group("run").add_argument
    run("--json", help="write the result to FILE", metavar="FILE")
    run("--against", help="a result of --json on the same games: print the gain over it with its "
        "95 %% interval (paired bootstrap over games)", metavar="FILE")
    run("--seed", help="seed of all random numbers", type=a_seed, default=0, metavar="N")
    run("--threads", help="CPU threads (default: all cores)", type=at_least_one, metavar="N")
    run("--slots", help="episodes at once (default: by the model's size)", type=at_least_one,
        metavar="N")
    run("--device", help="auto, cpu or cuda", default="auto", metavar="NAME")
    args = parser.parse_args()
    check(args)
    return args


def keep_by_expand(text):
    """"4x8" -> (4, 8)"""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(p.isdecimal() and 1 <= int(p) <= 1024 for p in parts):
        raise argparse.ArgumentTypeError(f"{text}: must be KxM, two whole numbers in 1 … 1024")
    return int(parts[0]), int(parts[1])


def methods(args):
    """The flags in use that act with the PRM."""
    used = {"--best-of": args.best_of > 1, "--act-beta": args.act_beta is not None,
            "--beam": args.beam, "--best-of-episodes": args.best_of_episodes > 1}
    return [flag for flag, given in used.items() if given]


def check(args):
    """UserError for flags that do not go together, before any work."""
    used, model = methods(args), args.agent == "policy"
    looked_at = args.watch or args.agent == "human"
    first = used[0] if used else ""
    across = first in ("--beam", "--best-of-episodes")
    for wrong, why in (
            (model and not args.policy, "--agent policy needs --policy DIR"),
            (not model and (args.policy or args.prm or used or args.watch),
             "--policy, --prm, --watch and the flags for a PRM are for --agent policy"),
            (len(used) > 1, f"{' and '.join(used)}: use one at a time"),
            (used and not args.prm, f"{first} needs --prm DIR"),
            (args.lookahead and first != "--best-of", "--lookahead needs --best-of N"),
            (used and not args.temperature, f"{first} needs a --temperature above 0"),
            (used and args.actions == "free" and first != "--best-of-episodes",
             f"{first} chooses among candidates: leave out --actions free"),
            (args.watch and across, f"--watch shows one episode: leave out {first}"),
            (looked_at and (args.json or args.against or args.engine == "both"),
             "--json, --against and --engine both are not for --watch or --agent human"),
            (args.beam and args.engine != "fast", "--beam restores states: use --engine fast")):
        if wrong:
            raise UserError(why)


def check_writable(path):
    """OSError or UserError, before any game is played, if a file cannot be written there."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise UserError(f"--json {path}: is not a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def earlier(file, games):
    """The episodes of an earlier result; UserError where that is no result on these games."""
    before = read_json(file)
    episodes = before.get("episodes") if isinstance(before, dict) else None
    fine = isinstance(episodes, list) and all(
        isinstance(e, dict) and isinstance(e.get("game"), str) and e.get("won") in (0, 1)
        for e in episodes)
    if not fine or {e["game"] for e in episodes} != {game.id for game in games}:
        raise UserError(f"--against {file}: not a result of eval.py --json on the same games")
    return episodes


def written(games, args, folder):
    """The same games with files, for alfworld's engine: generated ones are written to `folder`."""
    if games[0].path:
        return games
    split, chosen = "train" if args.split == "dev" else args.split, {game.id for game in games}
    pairs = generate(split, args.n_generated, tiny=args.games == "tiny")
    write_games((pair for pair in pairs if pair[0] in chosen), folder, split)
    return [Game.load(Path(folder, "json_2.1.1", split, game.id, "game.tw-pddl"))
            for game in games]


def acting(args, prm):
    """-> the options of `rollout` that say how the PRM acts"""
    if args.lookahead:
        return {"act": look_ahead(prm, args.best_of, args.lookahead, args.temperature)}
    if args.best_of > 1:
        return {"act": best_of_n(args.best_of), "prm": prm}
    if args.act_beta is not None:
        return {"act": tilted(args.act_beta), "prm": prm}
    return {"act": sample}


def evaluation(args, games, models):
    """-> player(make_env) -> the result of the `evaluate_*` that the flags ask for"""
    options = dict(max_steps=args.max_steps, seed=args.seed,
                   episodes_per_game=args.episodes_per_game)
    if args.agent != "policy":
        prior = None
        if args.agent == "expert":
            train = games_for(args.games, args.data, "train", args.n_generated)[0]
            prior = fit_prior(split_dev(train)[0])
        return lambda env: evaluate_scripted(args.agent, games, prior=prior, make_env=env,
                                             **options)
    policy, tokenizer, prm = models
    slots = args.slots or (slots_for(policy) // args.best_of if args.lookahead else None)
    if args.engine != "fast":
        slots = min(slots or 8, 8)
    options |= dict(temperature=args.temperature, slots=slots and max(1, slots))
    if args.beam:
        return lambda env: evaluate_beams(policy, prm, tokenizer, games, args.beam, **options)
    options["free"] = args.actions == "free"
    if args.best_of_episodes > 1:
        return lambda env: evaluate_best_episodes(policy, prm, tokenizer, games,
                                                  args.best_of_episodes, make_env=env, **options)
    return lambda env: evaluate_policy(policy, tokenizer, games, make_env=env,
                                       **acting(args, prm), **options)


def watch(args, games, models, make_env):
    """--watch: play one game and print it."""
    policy, tokenizer, prm = models
    game = games[generator(args.seed, "watch").integers(len(games))]
    trajectory, = rollout(policy, tokenizer, [Episode(game, 0)], temperature=args.temperature,
                          max_steps=args.max_steps, seed=args.seed, make_env=make_env,
                          free=args.actions == "free", **acting(args, prm))
    print(*narrate(explain(game, trajectory, policy, tokenizer, args.temperature, prm)), sep="\n")


def main():
    args = parse()
    if args.json:
        check_writable(args.json)
    set_up_torch(args.threads)
    games, source = games_for(args.games, args.data, args.split, args.n_generated)
    before = earlier(args.against, games) if args.against else None
    models, used = None, methods(args)
    if args.agent == "policy":
        device = pick_device(args.device)
        policy, tokenizer = read_model(args.policy, device)
        within = not args.lookahead and used in ([], ["--best-of"], ["--act-beta"])
        prm = read_prm(args.prm, tokenizer, device, within) if args.prm else None
        models = policy, tokenizer, prm
        if prm and not used and not args.watch:
            print("the PRM is not used: add --best-of, --act-beta, --beam or --best-of-episodes",
                  file=sys.stderr)
    worlds = {"fast": [AlfworldEnv], "alfworld": [ReferenceEnv],
              "both": [AlfworldEnv, ReferenceEnv]}[args.engine]
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        games = games if args.engine == "fast" else written(games, args, folder)
        if args.watch:
            return watch(args, games, models, worlds[-1])
        if args.agent == "human":
            episodes = play_by_hand(games, max_steps=args.max_steps, seed=args.seed,
                                    make_env=worlds[-1])
            return print(*(table(summarise(episodes, games)) if episodes else []), sep="\n")
        player = evaluation(args, games, models)
        results = [player(world) for world in worlds]
    result = {"agent": args.agent, "split": args.split, **results[-1],
              **{name: getattr(args, name) for name in (
                  "policy", "prm", "best_of", "act_beta", "lookahead", "best_of_episodes",
                  "actions", "max_steps", "engine", "episodes_per_game", "seed")},
              "beam": args.beam and "{}x{}".format(*args.beam), "data": source,
              "temperature": args.temperature if models else None,
              "seconds": round(time.monotonic() - start, 1), **provenance()}
    report(args, result, results, before)


def report(args, result, results, before):
    """Write the result to --json, then print it."""
    lines = [f"agent {args.agent}, {', '.join(methods(args)) or 'alone'}"]
    if args.json:
        write_json(args.json, result)
    print(*lines, *table(result), sep="\n")


if __name__ == "__main__":
    command_line(main)
