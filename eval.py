"""Success by split and task type, for any agent, as a table and as JSON.

    python eval.py --policy runs/default/best/policy --split valid_seen --episodes-per-game 5
    python eval.py --policy runs/default/iter0/policy --prm runs/default/iter1/prm --best-of 16
    python eval.py --policy DIR --prm DIR --act-beta 0.1            # act by π(a|s) · exp(Q(s,a)/β)
    python eval.py --policy DIR --prm DIR --best-of 16 --lookahead 1  # by imagined futures
    python eval.py --policy DIR --prm DIR --beam 4x4                # or --best-of-episodes 16
    python eval.py --policy DIR --prm DIR --watch    # one episode: π(a|s) and Q(s,a) at each step
    python eval.py --policy DIR --engine both        # the same episodes in alfworld's own engine
    python eval.py --agent expert                    # also random, and human: play yourself
"""

import argparse
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from fast_alfworld import (GAMES, AlfworldEnv, Expert, Human, fingerprint, fit_prior, games_for,
                           split_dev)
from fast_alfworld.cli import (Parser, UserError, a_seed, a_temperature, at_least_one, between,
                               command_line)
from fast_alfworld.files import provenance, write_json
from fast_alfworld.reference import ReferenceEnv
from fast_alfworld.score import (earlier, mean, narrate, paired_bootstrap, play_scripted, report,
                                 summarise)
from results import explain, result_of
from rollout import Episode, rollout, sample, slots_for
from search import beam_search, best_episodes, best_of_n, look_ahead, read_prm, tilted
from utils import generator, pick_device, read_model, run_config, set_up_torch

WORLDS = {"fast": [AlfworldEnv], "alfworld": [ReferenceEnv], "both": [AlfworldEnv, ReferenceEnv]}


def play(player, games, episodes_per_game, name):
    """All that player(list of Episode) yields, `rollout` or another, with a progress bar."""
    todo = [Episode(game, k) for game in games for k in range(episodes_per_game)]
    return list(tqdm(player(todo), name, len(todo), unit="episode", dynamic_ncols=True,
                     disable=name == "human"))


def evaluate_policy(policy, tokenizer, games, *, episodes_per_game=1, name="evaluate", **options):
    """Play every game `episodes_per_game` times; options: those of `rollout`. -> `result_of`"""
    return result_of(play(lambda todo: rollout(policy, tokenizer, todo, **options),
                          games, episodes_per_game, name), games)


def evaluate_beams(policy, prm, tokenizer, games, size, *, episodes_per_game=1, **options):
    """The same for `beam_search`; size: (keep, expand). -> also `world_actions`: actions taken in
    the world, mean of an episode"""
    found = play(lambda todo: beam_search(policy, prm, tokenizer, todo, *size, **options),
                 games, episodes_per_game, "beam search")
    return {**result_of([t for t, _ in found], games), "world_actions": mean(n for _, n in found)}


def evaluate_best_episodes(policy, prm, tokenizer, games, n, *, episodes_per_game=1, **options):
    """The same for Best-of-n over whole episodes. -> also `plain`: success of all the rollouts,
    and `oracle`: share of the choices in which one of the n was won (pass@n)"""
    played = play(lambda todo: rollout(policy, tokenizer, todo, **options),
                  games, episodes_per_game * n, "rollouts")
    choices, possible = ({(t.game, t.episode // n) for t in some}
                         for some in (played, [t for t in played if t.won]))
    return {**result_of(best_episodes(prm, played, n), games),
            "plain": mean(t.won for t in played), "oracle": len(possible) / len(choices)}


def evaluate_scripted(agent, games, expert, *, episodes_per_game=1, max_steps=30, seed=0,
                      make_env=AlfworldEnv):
    """The same without a policy: `expert` acts; agent "random": uniformly over the candidates."""
    mistakes, rng_of = float(agent == "random"), lambda *name: generator(seed, agent, *name)
    episodes = play(lambda todo: play_scripted(make_env(max_steps), todo, expert, rng_of, mistakes,
                                               max_steps), games, episodes_per_game, agent)
    if not episodes:
        raise UserError("no game was played to its end")
    return {**summarise(episodes, games), "episodes": episodes}


def parse():
    """The command line -> namespace, and the one flag that says how a PRM is used ("": none)"""
    parser, n = Parser(__doc__), dict(type=at_least_one)
    few = dict(type=between(1, 1024, int), default=1)
    add = lambda flag, help, **options: group.add_argument(flag, help=help, **options)
    group = parser.add_argument_group("agent")
    add("--agent", "who plays", default="policy", choices=("policy", "expert", "random", "human"))
    add("--policy", "folder of a policy")
    add("--prm", "folder of a PRM, for --watch and the flags that follow")
    group = group.add_mutually_exclusive_group()
    add("--best-of", "sample N actions a step, take the one of highest Q", **few)
    add("--act-beta", "sample actions from π(a|s) · exp(Q(s,a)/X)", type=between(1e-4, 1e9))
    add("--beam", "step-level beam search: keep K histories, sample M actions of each",
        type=keep_by_expand, metavar="KxM")
    add("--best-of-episodes", "play N times, take the episode of highest Q at its end", **few)
    group = parser.add_argument_group("acting")
    add("--lookahead", "with --best-of: compare by Q of what the policy imagines, D answers and D "
        "actions", type=between(0, 50, int), default=0, metavar="D")
    add("--temperature", "of the policy; 0: greedy", type=a_temperature, default=0.3, metavar="X")
    add("--actions", "choose among the candidates, or generate free text", default="candidates",
        choices=("candidates", "free"))
    add("--watch", "print one episode step by step, with the most likely candidates, π(a|s) and, "
        "with --prm, Q(s,a); --seed chooses the game", action="store_true")
    group = parser.add_argument_group("games")
    add("--split", "train, valid_seen, valid_unseen, or dev: 200 train games held out by task "
        "folder, the same for every policy", default="valid_seen")
    add("--games", "where they come from; auto: published ones if found", choices=GAMES,
        default="auto")
    add("--data", "published games (default: $ALFWORLD_DATA or ~/.cache/alfworld)")
    add("--n-generated", "number of games of a split, if generated", default=1000, **n)
    add("--episodes-per-game", "episodes a game", default=1, **n)
    add("--max-steps", "actions after which an episode is cut", default=30, **n)
    add("--engine", "the fast engine, alfworld's own, or both in turn, which counts equal episodes",
        choices=WORLDS, default="fast")
    group = parser.add_argument_group("run")
    add("--json", "file for the result")
    add("--against", "a file of --json on the same games: print the gain over it with its 95 %% "
        "interval (paired bootstrap over games)")
    add("--seed", "seed of all random numbers", type=a_seed, default=0)
    add("--threads", "CPU threads (default: all cores)", **n)
    add("--device", "auto, cpu or cuda", default="auto")
    args = parser.parse_args()
    given = {"--best-of": args.best_of > 1, "--act-beta": args.act_beta, "--beam": args.beam,
             "--best-of-episodes": args.best_of_episodes > 1}
    return args, next((flag for flag, value in given.items() if value), "")


def keep_by_expand(text):  # "4x8"
    parts = text.split("x")
    if len(parts) != 2 or not all(p.isdecimal() and 1 <= int(p) <= 64 for p in parts):
        raise argparse.ArgumentTypeError(f"{text}: must be KxM, two whole numbers in 1 … 64")
    return text


def check(args, used):
    """UserError or OSError, before any work, for flags that do not go together."""
    model, one = args.agent == "policy", args.watch or args.agent == "human"
    file = Path(args.json or "/nowhere")
    for wrong, why in (
            (model and not args.policy, "--agent policy needs --policy DIR"),
            (not model and (args.policy or args.prm or used or args.watch),
             "--policy, --prm, --watch and the flags for a PRM are for --agent policy"),
            (args.prm and not used and not args.watch, "--prm needs --best-of, --watch, …"),
            (used and not args.prm, f"{used} needs --prm DIR"),
            (args.lookahead and used != "--best-of", "--lookahead needs --best-of N"),
            (used and not args.temperature, f"{used} needs a --temperature above 0"),
            (args.actions == "free" and used not in ("", "--best-of-episodes"),
             f"{used} chooses among candidates: leave out --actions free"),
            (args.watch and used in ("--beam", "--best-of-episodes"),
             f"--watch shows one episode: leave out {used}"),
            (one and (args.json or args.against or args.engine == "both"),
             "--json, --against and --engine both are not for --watch or --agent human"),
            (args.beam and args.engine != "fast", "--beam restores states: use --engine fast"),
            (file.exists() and not file.is_file(), f"--json {args.json}: not a file")):
        if wrong:
            raise UserError(why)
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=Path(args.json).parent).close()


def evaluation(args, games, policy, tokenizer, prm):
    """-> evaluate(make_env) -> the result of the `evaluate_*` that the flags ask for"""
    options = {name: getattr(args, name) for name in ("max_steps", "seed", "episodes_per_game")}
    if not policy:
        expert = Human() if args.agent == "human" else Expert({})
        if args.agent == "expert":
            train, _ = split_dev(games_for(args.games, args.data, "train", args.n_generated)[0])
            expert = Expert(fit_prior(train))
        return lambda env: evaluate_scripted(args.agent, games, expert, make_env=env, **options)
    options["temperature"] = args.temperature
    if args.beam:
        size = [int(n) for n in args.beam.split("x")]
        return lambda env: evaluate_beams(policy, prm, tokenizer, games, size, **options)
    slots = slots_for(policy) // (args.best_of if args.lookahead else 1)
    options["slots"] = max(1, slots if args.engine == "fast" else min(slots, 8))
    options |= acting(args, prm)
    if args.best_of_episodes == 1:
        return lambda env: evaluate_policy(policy, tokenizer, games, make_env=env, **options)
    return lambda env: evaluate_best_episodes(policy, prm, tokenizer, games, args.best_of_episodes,
                                              make_env=env, **options)


def acting(args, prm):
    """-> the options of `rollout` that say how the agent acts"""
    if args.lookahead:
        return {"act": look_ahead(prm, args.best_of, args.lookahead, args.temperature)}
    if args.best_of > 1 or args.act_beta:
        return {"prm": prm, "act": tilted(args.act_beta, prm.bounded) if args.act_beta
                else best_of_n(args.best_of)}
    return {"act": None if args.actions == "free" else sample}


def main():
    args, used = parse()
    check(args, used)
    set_up_torch(args.threads)
    games, source = games_for(args.games, args.data, args.split, args.n_generated)
    if args.engine != "fast":
        ReferenceEnv().load(games[0])  # it refuses now what it would refuse later
    before = earlier(args.against, games) if args.against else None
    policy = tokenizer = prm = None
    if args.policy:
        device = pick_device(args.device)
        policy, tokenizer = read_model(args.policy, device)
        dev = run_config(args.policy).get("games", {}).get("dev")
        if args.split == "dev" and dev not in (None, fingerprint(games)):
            raise UserError(f"--split dev: the run of {args.policy} held out other games ({dev}; "
                            f"here {fingerprint(games)}), and may have learned from these")
        within = not args.lookahead and used in ("", "--best-of", "--act-beta")
        prm = read_prm(args.prm, tokenizer, device, within) if args.prm else None
    if args.watch or args.agent == "human":
        games = [games[i] for i in generator(args.seed, "order").permutation(len(games))]
    if args.watch:
        [t] = rollout(policy, tokenizer, [Episode(games[0], 0)], temperature=args.temperature,
                      max_steps=args.max_steps, seed=args.seed, make_env=WORLDS[args.engine][0],
                      **acting(args, prm))
        print(*narrate(explain(games[0], t, policy, tokenizer, args.temperature, prm)), sep="\n")
        return
    start, evaluate = time.monotonic(), evaluation(args, games, policy, tokenizer, prm)
    results = [evaluate(world) for world in WORLDS[args.engine]]
    flags = {name: value for name, value in vars(args).items() if name not in (
        "json", "against", "watch", "data", "games", "threads", "device")}
    result = {**flags, **results[-1], "temperature": args.temperature if policy else None,
              "data": source, "seconds": round(time.monotonic() - start, 1), **provenance()}
    if args.engine == "both":
        result["equal_episodes"] = sum(map(dict.__eq__, *(r["episodes"] for r in results)))
    if before:
        result["gain"] = paired_bootstrap(before, result["episodes"])
    if args.json:
        write_json(args.json, result)
    print(*report(result, args.against, f" {used}" if used else ""), sep="\n")


if __name__ == "__main__":
    command_line(main)
