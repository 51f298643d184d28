"""Success by split and task type, for any agent, as a table and as JSON.

    python eval.py --policy runs/default/best/policy --split valid_seen --episodes-per-game 5
    python eval.py --policy runs/default/iter0/policy --prm runs/default/iter1/prm --best-of 16 --split dev
    python eval.py --policy … --prm … --best-of 16 --lookahead 1     # by what the policy imagines to come of each action
    python eval.py --policy … --prm … --beam 4x4                     # these two ask more of the world: it can be set back,
    python eval.py --policy … --prm … --best-of-episodes 16          # or played again
    python eval.py --policy … --prm … --watch                        # one episode step by step, with what else the policy proposes, and Q
    python eval.py --agent human                                     # play yourself
    python eval.py --agent expert --split valid_seen          # and --agent random: what the numbers are to be read against
    python eval.py --policy DIR --engine alfworld             # judged by alfworld's own engine; both: by ours too, episode by episode
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import (Parser, UserError, a_seed, a_temperature, check_writable, command_line, generator, pick_device, read_json, read_model,
                    set_up_torch, write_json)
from env import TASK_TYPES, AlfworldEnv
from expert import Expert, demonstrate, fit_prior
from flags import origin
from games import COMPLETE, game_flags, games_as, games_for, split_dev, write_games
from generate import generate
from play import PROPOSED_AT, narrated, play_by_hand, told
from prm import score, sigmoid
from rollout import rollout, slots_for
from search import beam_search, best_episodes, best_of_n, last_scores, prediction_accuracy, read_prm
from stock import StockAlfworldEnv, alfworld_version


def summarise(episodes, games):
    """[{"game", "won", "actions", …}] -> success in [0, 1] and mean actions (over all episodes), overall and by task type."""
    type_of = {game.id: game.task_type for game in games}

    def share(part):
        return {"games": len({e["game"] for e in part}), "success": float(np.mean([e["won"] for e in part])),
                "mean_actions": float(np.mean([e["actions"] for e in part]))}

    by_task = {t: [e for e in episodes if type_of[e["game"]] == t] for t in TASK_TYPES}
    return {**share(episodes), "by_task": {t: share(part) for t, part in by_task.items() if part}}


def result_of(trajectories, games):
    """-> the results of `summarise`, the share of inadmissible actions, the episodes."""
    done = sorted(trajectories, key=lambda t: (t.game, t.episode))
    episodes = [{"game": t.game, "won": bool(t.won), "actions": len(t)} for t in done]
    return {**summarise(episodes, games), "inadmissible": float(np.mean(np.concatenate([t.inadmissible for t in done]))), "episodes": episodes}


def play(player, games, episodes_per_game, name):
    """All that player([(game, episode number)]) yields, `rollout` or another, with a bar."""
    todo = [(game, k) for game in games for k in range(episodes_per_game)]
    return list(tqdm(player(todo), name, len(todo), unit="episode", dynamic_ncols=True))


def evaluate_policy(policy, tokenizer, games, *, episodes_per_game=1, temperature=0.3, max_steps=30, seed=0, slots=None, choose=None,
                    admissible=False, make_env=AlfworldEnv, predictions=False, name="evaluate"):
    """Play every game `episodes_per_game` times. -> `result_of`; with `predictions` also how well the policy foretells the world's answers."""
    trajectories = play(lambda todo: rollout(policy, tokenizer, todo, temperature=temperature, seed=seed, slots=slots, max_steps=max_steps,
                                             admissible=admissible, choose=choose, make_env=make_env), games, episodes_per_game, name)
    return {**result_of(trajectories, games), **({"predictions": prediction_accuracy(policy, trajectories)} if predictions else {})}


def evaluate_beams(policy, prm, tokenizer, games, keep, expand, *, episodes_per_game=1, **options):
    """The same for `beam_search`, and `world_actions`: actions tried in the world, mean of an episode."""
    found = play(lambda todo: beam_search(policy, prm, tokenizer, todo, keep, expand, **options), games, episodes_per_game, f"beams {keep}x{expand}")
    return {**result_of([t for t, _ in found], games), "world_actions": float(np.mean([tried for _, tried in found]))}


def evaluate_best_episodes(policy, prm, tokenizer, games, n, *, episodes_per_game=1, **options):
    """The same for whole-episode Best-of-N, with `judge_best_episodes`."""
    trajectories = play(lambda todo: rollout(policy, tokenizer, todo, **options), games, episodes_per_game * n, f"best of {n} episodes")
    return judge_best_episodes(trajectories, last_scores(prm, trajectories), n, games)


def judge_best_episodes(trajectories, q, n, games):
    """`result_of` the best of every n rollouts of a game by q, their `last_scores`; beside it what it is to be read against.

    `plain`: success and mean actions of all the rollouts; `oracle`: the share of the choices in which one of the n had won (pass@n).
    """
    groups = {}
    for t in trajectories:
        groups.setdefault((t.game, t.episode // n), []).append(t.won)
    return {**result_of(best_episodes(trajectories, q, n), games), "oracle": float(np.mean([any(won) for won in groups.values()])),
            "plain": {"success": float(np.mean([t.won for t in trajectories])), "mean_actions": float(np.mean([len(t) for t in trajectories]))}}


def evaluate_scripted(agent, games, *, prior=None, episodes_per_game=1, max_steps=30, seed=0, make_env=AlfworldEnv):
    """The same for agents without a model: "expert", or "random" (uniform over the admissible commands)."""
    env, episodes = make_env(max_steps), []
    for game in tqdm(games, agent, unit="game", dynamic_ncols=True):
        for k in range(episodes_per_game):
            rng = generator(seed, agent, game.id, k)
            if agent == "expert":
                demo = demonstrate(env, game, Expert(prior, rng), rng, max_steps=max_steps)
                won, actions = demo.won, len(demo.steps)
            else:
                _, info = env.reset(game)
                won, actions = False, 0
                while not won and actions < max_steps:
                    commands = info["admissible_commands"]
                    _, _, won, _, info = env.step(commands[rng.integers(len(commands))])
                    actions += 1
            episodes.append({"game": game.id, "won": bool(won), "actions": actions})
    return {**summarise(episodes, games), "episodes": episodes}


def paired_bootstrap(before, after, n=10_000, seed=0):
    """Two lists of episodes on the same games -> (mean difference in success, 2.5 % and 97.5 % quantile), resampling games."""
    def by_game(episodes):
        won = {}
        for e in episodes:
            won.setdefault(e["game"], []).append(e["won"])
        return {game: np.mean(w) for game, w in won.items()}

    a, b = by_game(before), by_game(after)
    if a.keys() != b.keys():
        raise ValueError("a paired bootstrap needs the same games on both sides")
    gap = np.array([b[game] - a[game] for game in sorted(a)])
    means = gap[np.random.default_rng(seed).integers(len(gap), size=(n, len(gap)))].mean(1)
    return float(gap.mean()), *map(float, np.quantile(means, (0.025, 0.975)))


def table(result):
    """A result of `evaluate_*` -> lines of text."""
    lines = [f"{'task type':34}{'games':>7}{'success':>10}{'actions':>10}"]
    for name, r in (*result["by_task"].items(), ("all", result)):
        lines.append(f"{name:34}{r['games']:7}{r['success']:10.1%}{r['mean_actions']:10.2f}")
    return lines


def remarks(result):
    """What else a result of `evaluate_*` tells -> lines of text."""
    lines = []
    if "plain" in result:
        lines.append(f"of all the episodes: {result['plain']['success']:.1%}, {result['plain']['mean_actions']:.2f} actions; "
                     f"one of the {result['best_of_episodes']} won (oracle): {result['oracle']:.1%}")
    if "world_actions" in result:
        lines.append(f"actions tried in the world an episode: {result['world_actions']:.1f}")
    if result.get("predictions", {}).get("answers"):
        lines.append(f"the world's answers foretold: {result['predictions']['exact']:.1%} exactly, "
                     f"{result['predictions']['tokens']:.1%} of their tokens")
    if "equal_episodes" in result:
        lines.append(f"won and actions alike in both engines: {result['equal_episodes']:,} of {len(result['episodes']):,} episodes")
    if "inadmissible" in result:
        lines.append(f"inadmissible actions: {result['inadmissible']:.1%}")
    return lines


def earlier(file, games):
    """The episodes of an earlier result of --json; UserError where that is no result on these games."""
    before = read_json(file)
    episodes = before.get("episodes") if isinstance(before, dict) else None
    if not isinstance(episodes, list) or {e["game"] for e in episodes} != {game.id for game in games}:
        raise UserError(f"--against {file}: no result of eval.py --json on the same games")
    return episodes


def keep_by_expand(text):
    """"4x8" -> (4, 8)"""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text} is not KxM, two whole numbers of at least 1")
    return int(parts[0]), int(parts[1])


def check(args):
    """UserError for flags that do not go together."""
    searches = [flag for flag, used in (("--best-of", args.best_of > 1), ("--beam", args.beam),
                                        ("--best-of-episodes", args.best_of_episodes > 1)) if used]
    if args.agent == "policy" and not args.policy:
        raise UserError("--agent policy needs --policy DIR (a folder written by train.py or sft.py)")
    if args.agent != "policy" and searches:
        raise UserError(f"{searches[0]} is for --agent policy")
    if len(searches) > 1:
        raise UserError(f"{' and '.join(searches)}: one at a time")
    if args.lookahead and searches != ["--best-of"]:
        raise UserError("--lookahead needs --best-of N, the candidates that it compares")
    if args.watch and (args.agent != "policy" or args.beam or args.best_of_episodes > 1):
        raise UserError("--watch is for --agent policy that plays an episode once: with --best-of or without")
    if args.json and (args.watch or args.agent == "human"):
        raise UserError("--json is for evaluations, not for --watch or --agent human")
    if searches and not args.prm:
        raise UserError(f"{searches[0]} needs --prm DIR")
    if args.json and Path(args.json).is_dir():
        raise UserError(f"--json {args.json}: is a folder; name a file")
    if args.agent != "policy" and (args.admissible or args.prm or args.policy):
        raise UserError("--policy, --prm and --admissible are for --agent policy")
    if not args.temperature and searches:
        raise UserError(f"{searches[0]} with --temperature 0: all samples would be the same")
    if args.admissible and (args.best_of > 1 or args.beam):
        raise UserError(f"--admissible is for plain sampling, not for {searches[0]}")
    if args.engine == "both" and (args.watch or args.agent == "human"):
        raise UserError("--engine both is for evaluations, not for --watch or --agent human")
    if args.beam and args.engine != "fast":
        raise UserError("--beam needs a world that can be set back: --engine fast")
    if (min(args.best_of, args.best_of_episodes, args.episodes_per_game, args.max_steps,
            *(n for n in (args.n_generated, args.slots) if n is not None)) < 1
            or args.lookahead < 0):
        raise UserError("--best-of, --best-of-episodes, --n-generated, --episodes-per-game, --max-steps and --slots are at least 1, "
                        "--lookahead at least 0")


def searched(args):
    """How the PRM helps, in words; "" where it does not."""
    if args.best_of > 1:
        return f", Best-of-{args.best_of}" + f" looking {args.lookahead} ahead" * bool(args.lookahead)
    if args.beam:
        return ", beam {}x{}".format(*args.beam)
    return f", Best-of-{args.best_of_episodes} episodes" if args.best_of_episodes > 1 else ""


def parse():
    """The command line -> namespace."""
    parser = Parser(__doc__)
    add = lambda group, flag, help, **kw: group.add_argument(flag, help=help, **kw)
    who = parser.add_argument_group("agent")
    add(who, "--agent", "who plays", default="policy", choices=("policy", "expert", "random", "human"))
    add(who, "--policy", "folder of a policy", metavar="DIR")
    add(who, "--prm", "folder of a PRM, for what follows", metavar="DIR")
    add(who, "--best-of", "sample N actions a step and take the one of highest Q", type=int, default=1, metavar="N")
    add(who, "--lookahead", "compare the N actions of --best-of by the Q of what the policy imagines after them: "
        "D answers of the world and D actions; 0: not", type=int, default=0, metavar="D")
    add(who, "--beam", "step-level beam search: K histories are kept, each samples M actions, the K of highest Q go on; "
        "the world is set back as needed", type=keep_by_expand, metavar="KxM")
    add(who, "--best-of-episodes", "play every episode N times and take the one of highest Q at its last action", type=int, default=1, metavar="N")
    add(who, "--watch", "play one game, that of --seed, and print it step by step: what else the policy proposes and, with --prm, Q",
        action="store_true")
    add(who, "--temperature", "sampling temperature; 0 is greedy", type=a_temperature, default=0.3, metavar="X")
    add(who, "--admissible", "sample only commands that the world would accept (default: off, free generation)", action="store_true")
    what = parser.add_argument_group("games")
    game_flags(what, "valid_seen")
    add(what, "--n-generated", f"how many generated games a split has (default: {COMPLETE['train']} of train, whose share is dev, 200 of others)",
        type=int, metavar="N")
    add(what, "--episodes-per-game", "episodes a game", type=int, default=1, metavar="N")
    add(what, "--max-steps", "actions after which an episode is cut", type=int, default=30)
    add(what, "--engine", "the fast exact world, or alfworld's own; both: each in turn, and how many episodes are equal", default="fast",
        choices=("fast", "alfworld", "both"))
    run = parser.add_argument_group("run")
    add(run, "--seed", "names all randomness", type=a_seed, default=0)
    add(run, "--threads", "CPU threads (default: all cores)", type=int, metavar="N")
    add(run, "--slots", "episodes in flight at once (default: 128 on a CPU, 1024 on a GPU, fewer of a large model)", type=int, metavar="N")
    add(run, "--device", "auto, cpu or cuda", default="auto")
    add(run, "--json", "write the result there", metavar="FILE")
    add(run, "--against", "a result of --json on the same games: print the gain over it, with its 95 %% interval (paired bootstrap over games)",
        metavar="FILE")
    args = parser.parse_args()
    check(args)
    return args


def chosen_games(args):
    """-> games, where they come from, and the folder that holds them if they had to be written for alfworld's engine (None: they had not)"""
    (flags, theirs), stock = origin(args.policy) if args.policy else ({}, {}), args.engine != "fast"
    if args.split == "dev" and flags and "train" in theirs:
        if args.games != "auto" or args.n_generated:
            raise UserError("--games, --n-generated: dev is what the policy's run held out of its own games; leave them out")
        games, source = games_as(flags, theirs["train"], "dev", args.data, args.policy)  # what this policy was not trained on
        if stock and games[0].path is None:
            raise UserError(f"--engine {args.engine}: generated games that a run held out are not written for it; another --split")
    else:
        # dev as train.py and sft.py hold it out
        args.n_generated = args.n_generated or (COMPLETE["train"] if args.split in ("dev", "train") else 200)
        games, source = games_for(args.games, args.data, args.split, args.n_generated)
    if not stock or games[0].path is not None:
        return games, source, None
    folder, split = tempfile.TemporaryDirectory(), "train" if args.split == "dev" else args.split  # alfworld's engine reads files
    write_games(generate(split, args.n_generated, tiny=args.games == "tiny"), folder.name, split)
    return games_for("alfworld", folder.name, args.split)[0], source, folder


def chooser(args, prm):
    """What --best-of asks for -> `choose` of `rollout`, or None"""
    return best_of_n(prm, args.best_of, args.lookahead) if args.best_of > 1 else None


def evaluation(args, games, policy=None, tokenizer=None, prm=None):
    """-> player(make_env) -> result of the `evaluate_*` that the flags ask for"""
    common = dict(max_steps=args.max_steps, seed=args.seed, episodes_per_game=args.episodes_per_game)
    if args.agent != "policy":
        n = args.n_generated if args.split in ("dev", "train") else 1000  # the dev games are those left out of as many
        prior = fit_prior(split_dev(games_for(args.games, args.data, "train", n)[0])[0]) if args.agent == "expert" else None
        return lambda make_env: evaluate_scripted(args.agent, games, prior=prior, make_env=make_env, **common)
    common |= dict(temperature=args.temperature, slots=args.slots)
    if args.beam:
        return lambda make_env: evaluate_beams(policy, prm, tokenizer, games, *args.beam, make_env=make_env, **common)
    if args.best_of_episodes > 1:
        return lambda make_env: evaluate_best_episodes(policy, prm, tokenizer, games, args.best_of_episodes, admissible=args.admissible,
                                                       make_env=make_env, **common)
    common["slots"] = args.slots or slots_for(policy, args.best_of)
    return lambda make_env: evaluate_policy(policy, tokenizer, games, choose=chooser(args, prm), admissible=args.admissible,
                                            predictions=args.lookahead > 0, make_env=make_env, **common)


def main():
    args = parse()
    if args.json:
        check_writable(args.json)
    set_up_torch(args.threads)
    games, source, folder = chosen_games(args)  # the folder lives as long as its name here
    before = earlier(args.against, games) if args.against else None
    worlds = {"fast": [AlfworldEnv], "alfworld": [StockAlfworldEnv], "both": [AlfworldEnv, StockAlfworldEnv]}[args.engine]
    if args.engine != "fast":
        args.slots = min(args.slots or 8, 8)
    if args.agent == "human":
        episodes = play_by_hand(games, max_steps=args.max_steps, seed=args.seed, make_env=worlds[-1])
        print(*(table(summarise(episodes, games)) if episodes else ["no game was played to its end"]), sep="\n")
        return
    start, agent, prm_used = time.monotonic(), (), False
    if args.agent == "policy":
        device = pick_device(args.device)
        policy, tokenizer = read_model(args.policy, device)
        prm_used = bool(searched(args) or args.watch and args.prm)
        prm = read_prm(args.prm, tokenizer, device, one_state=args.best_of > 1 and not args.lookahead and not args.watch) if prm_used else None
        agent = policy, tokenizer, prm
    if args.watch:
        game = games[generator(args.seed, "watch").integers(len(games))]
        [trajectory] = rollout(policy, tokenizer, [(game, 0)], choose=chooser(args, prm), admissible=args.admissible,
                               temperature=args.temperature, slots=args.slots, max_steps=args.max_steps, seed=args.seed, make_env=worlds[-1])
        print(*narrated(told(game, trajectory, policy, tokenizer, PROPOSED_AT, args.seed, prm,
                             prm and sigmoid(score(prm, [trajectory])[0]))), sep="\n")
        return
    play_in = evaluation(args, games, *agent)
    results = [play_in(world) for world in worlds]
    result = {"agent": args.agent, "split": args.split, **results[-1], "max_steps": args.max_steps,
              "temperature": args.temperature if args.agent == "policy" else None, "best_of": args.best_of, "lookahead": args.lookahead,
              "beam": args.beam and "{}x{}".format(*args.beam), "best_of_episodes": args.best_of_episodes, "admissible": args.admissible,
              "policy": args.policy, "prm": args.prm if prm_used else None, "engine": args.engine, "alfworld": alfworld_version(), "data": source,
              "episodes_per_game": args.episodes_per_game, "seed": args.seed, "seconds": round(time.monotonic() - start, 1)}
    if args.engine == "both":
        result["equal_episodes"] = sum(ours == theirs for ours, theirs in zip(*(r["episodes"] for r in results)))
    if args.prm and not prm_used:
        print("the PRM only chooses with --best-of N, --best-of-episodes N or --beam KxM: the policy played alone", file=sys.stderr)
    print(f"agent {args.agent}{searched(args)}, {source}, cap {args.max_steps}, temperature {result['temperature']}, engine {args.engine}, "
          f"alfworld {result['alfworld']}, {args.episodes_per_game} episode(s) a game")
    print(*table(result), *remarks(result), sep="\n")
    if before:
        gain = paired_bootstrap(before, result["episodes"])
        print("gain over {}: {:+.1f} points ({:+.1f} … {:+.1f})".format(args.against, *(100 * x for x in gain)))
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    command_line(main)
