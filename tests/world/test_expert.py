"""The expert: reads every task, plays from text alone, recovers, and says which of its actions are mistakes."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from env import NOTHING_HAPPENS, AlfworldEnv, Game
from expert import TOOLS, Expert, Task, demonstrate, fit_prior, parse_task, report
from games import generated_split, load_split

DEAD_ENDS = ("papertowelroll", "teddybear")  # in some games these can be picked up but put down nowhere


@pytest.fixture(scope="module")
def train(data_dir):
    """Every sixth training game: all rooms and task types."""
    return [Game.load(path) for path in sorted(data_dir.glob("train/*/*/game.tw-pddl"))[::6]]


@pytest.fixture(scope="module")
def prior(train):
    return fit_prior(train)


# --- reading ----------------------------------------------------------------------------------------------------------

def test_every_task_sentence_of_alfworld_is_read():
    library = pytest.importorskip("alfworld.gen.goal_library").gdict
    kinds = {"pick_and_place_simple": "put", "look_at_obj_in_light": "look", "pick_two_obj_and_place": "two",
             **{f"pick_{kind}_then_place_in_recep": kind for kind in TOOLS}}
    for name, kind in kinds.items():
        assert len(library[name]["templates"]) == 2
        for template in library[name]["templates"]:
            sentence = template.format(obj="soapbar", recep="sinkbasin", toggle="sinkbasin") + "."
            assert parse_task(sentence) == Task(kind, "soapbar", "sinkbasin")


def test_another_task_is_refused():
    with pytest.raises(ValueError, match="not a task of ALFWorld: 'make tea.'"):
        parse_task("make tea.")


def test_the_tasks_of_real_games_are_read(train):
    for game in train:
        task = parse_task(game.task)
        lamp_or_receptacle = [game.names[i] for i in range(game.n_objects) if game.lamps >> i & 1] or [
            game.names[game.n_objects + r] for r in game.goal_receptacles]
        assert all(name.startswith(task.place + " ") for name in lamp_or_receptacle)


# --- a world of text: nothing else to peek at ---------------------------------------------------------------------------

class Script:
    """Looks like an environment, and is a list of expected commands and answers."""

    def __init__(self, task, *lines, rooms="a cabinet 2, a cabinet 1, and a desk 1"):
        self.game = SimpleNamespace(task=task)
        self.first = f"-= Welcome to TextWorld, ALFRED! =-\n\nYou are in the middle of a room. You see {rooms}.\n\nYour task is to: {task}"
        self.lines = lines

    def reset(self, game):
        self.left = list(self.lines)
        return self.first, {}

    def step(self, action):
        expected, answer = self.left.pop(0)
        assert action == expected
        return answer, 0.0, not self.left, False, {}


def play(script, prior):
    assert demonstrate(script, script.game, Expert(prior), np.random.default_rng(0)).won


def test_it_searches_where_the_prior_says_and_opens_what_is_closed():
    play(Script("put some mug on desk.",
                ("go to cabinet 2", "You arrive at cabinet 2. The cabinet 2 is closed."),
                ("open cabinet 2", "You open the cabinet 2. The cabinet 2 is open. In it, you see nothing."),
                ("go to cabinet 1", "You arrive at cabinet 1. On the cabinet 1, you see a cup 1, and a mug 3."),
                ("take mug 3 from cabinet 1", "You pick up the mug 3 from the cabinet 1."),
                ("go to desk 1", "You arrive at desk 1. On the desk 1, you see nothing."),
                ("move mug 3 to desk 1", "You move the mug 3 to the desk 1.")),
         prior={"mug": {"cabinet": 0.1, "desk": 0.05}})


def test_it_goes_on_from_where_it_was_led_and_comes_back_for_the_rest():
    expert = Expert({"mug": {"cabinet": 1, "desk": 0.5}})
    script = Script("put some mug on sofa.", rooms="a cabinet 4, a cabinet 3, a cabinet 2, a cabinet 1, a desk 1, and a sofa 1")
    expert.reset(script.game.task, script.first)
    nothing = lambda name: f"You arrive at {name}. On the {name}, you see nothing."
    expert.observe("go to cabinet 2", nothing("cabinet 2"))
    expert.observe("go to sofa 1", nothing("sofa 1"))
    assert expert.act() == "go to cabinet 1"
    assert expert.act("You arrive at cabinet 1. The cabinet 1 is closed.") == "open cabinet 1"
    assert expert.act("You open the cabinet 1. The cabinet 1 is open. In it, you see nothing.") == "go to cabinet 4"
    assert expert.act(nothing("cabinet 4")) == "go to cabinet 3"
    assert expert.act(nothing("cabinet 3")) == "go to desk 1"


def test_two_receptacles_at_one_location():
    """`go to` fails for what is already within reach; a cabinet may have no door."""
    play(Script("look at mug under the desklamp.",
                ("go to cabinet 2", "You arrive at cabinet 2. On the cabinet 2, you see nothing."),
                ("go to cabinet 1", NOTHING_HAPPENS),
                ("open cabinet 1", NOTHING_HAPPENS),
                ("examine cabinet 1", "On the cabinet 1, you see a desklamp 1."),
                ("go to desk 1", "You arrive at desk 1. On the desk 1, you see a mug 1."),
                ("take mug 1 from desk 1", "You pick up the mug 1 from the desk 1."),
                ("go to cabinet 1", "You arrive at cabinet 1. On the cabinet 1, you see a desklamp 1."),
                ("use desklamp 1", "You turn on the desklamp 1.")),
         prior={"mug": {"cabinet": 0.2, "desk": 0.05}})


def test_two_objects_go_to_the_same_receptacle_and_the_first_stays_there():
    play(Script("find two pen and put them in desk.",
                ("go to cabinet 1", "You arrive at cabinet 1. On the cabinet 1, you see a pen 2, and a pen 1."),
                ("take pen 2 from cabinet 1", "You pick up the pen 2 from the cabinet 1."),
                ("go to desk 2", "You arrive at desk 2. On the desk 2, you see nothing."),
                ("move pen 2 to desk 2", "You move the pen 2 to the desk 2."),
                ("go to cabinet 1", "You arrive at cabinet 1. On the cabinet 1, you see a pen 1."),
                ("take pen 1 from cabinet 1", "You pick up the pen 1 from the cabinet 1."),
                ("go to desk 2", "You arrive at desk 2. On the desk 2, you see a pen 2."),
                ("move pen 1 to desk 2", "You move the pen 1 to the desk 2."), rooms="a cabinet 1, a desk 2, and a desk 1"),
         prior={"pen": {"cabinet": 1}})


def test_a_wrong_object_goes_back_and_work_done_is_remembered():
    expert = Expert({"mug": {"desk": 1}})
    script = Script("put a hot mug in desk.", rooms="a desk 1, a fridge 1, and a microwave 1")
    expert.reset(script.game.task, script.first)
    expert.observe("go to desk 1", "You arrive at desk 1. On the desk 1, you see a cup 1, and a mug 1.")
    expert.observe("take cup 1 from desk 1", "You pick up the cup 1 from the desk 1.")
    assert expert.act() == "move cup 1 to desk 1"
    assert expert.act("You move the cup 1 to the desk 1.") == "take mug 1 from desk 1"
    expert.observe("take mug 1 from desk 1", "You pick up the mug 1 from the desk 1.")
    expert.observe("go to microwave 1", "You arrive at microwave 1. The microwave 1 is closed.")
    expert.observe("heat mug 1 with microwave 1", "You heat the mug 1 using the microwave 1.")
    assert expert.act() == "go to desk 1"
    expert.observe("go to fridge 1", "You arrive at fridge 1. The fridge 1 is closed.")
    expert.observe("cool mug 1 with fridge 1", "You cool the mug 1 using the fridge 1.")
    assert expert.act() == "go to microwave 1"  # cold again


# --- whole games --------------------------------------------------------------------------------------------------------

def test_it_solves_valid_seen(data_dir, prior):
    games = load_split(data_dir, "valid_seen")
    won = [demonstrate(AlfworldEnv(), game, Expert(prior), np.random.default_rng(0)).won for game in games]
    assert np.mean(won) >= 0.98


def test_it_solves_generated_games_in_other_rooms():
    pytest.importorskip("alfworld")
    prior = fit_prior(generated_split("train", 200))
    rng = np.random.default_rng(0)
    demos = [demonstrate(AlfworldEnv(), game, Expert(prior), rng, mistakes=0.1, max_steps=50) for game in generated_split("valid_unseen", 60)]
    assert np.mean([demo.won for demo in demos]) >= 0.95
    assert report(demos, 50)[0].split() == "task games actions won in 20 won in 30 won in 50".split()
    assert report(demos, 50)[-1].split()[:2] == ["all", "60"]


def test_it_solves_training_games_in_spite_of_mistakes(train, prior):
    rng = np.random.default_rng(0)
    demos = [demonstrate(AlfworldEnv(), game, Expert(prior), rng, mistakes=0.2) for game in train]
    assert np.mean([demo.won for demo in demos]) >= 0.97
    steps = [step for demo in demos for step in demo.steps]
    assert 0.15 < np.mean([not step.trained for step in steps]) < 0.3
    assert np.mean([step.observation == NOTHING_HAPPENS for step in steps if step.trained]) < 0.02
    wrong = {step.action.split()[0] for step in steps if not step.trained}
    assert wrong >= {"go", "take", "move", "open", "close", "examine", "look", "use", "clean", "heat", "cool"}  # varied


def test_it_recovers_from_the_actions_of_another(train, prior):
    rng, env, won = np.random.default_rng(1), AlfworldEnv(), []
    for game in train[::3]:
        observation, info = env.reset(game)
        expert = Expert(prior)
        expert.reset(game.task, observation)
        for _ in range(12):
            action = rng.choice([c for c in (*info["admissible_commands"], "go to moon 1", "", "take") if not c.startswith(
                tuple(f"take {name}" for name in DEAD_ENDS))])
            observation, _, _, _, info = env.step(action)
            expert.observe(action, observation)
        while not env.won and env.steps < 62:
            observation = env.step(expert.act(observation))[0]
        won.append(env.won)
    assert np.mean(won) >= 0.99


def test_what_it_does_is_a_function_of_the_transcript(train, prior):
    """Trained actions are what a fresh expert does after the same transcript; mistakes never are."""
    rng = np.random.default_rng(2)
    for game in train[::20]:
        demo = demonstrate(AlfworldEnv(), game, Expert(prior), rng, mistakes=0.3)
        expert = Expert(json.loads(json.dumps(prior)))
        expert.reset(demo.task, demo.observation)
        for step in demo.steps:
            assert (expert.act() == step.action) == step.trained
            expert.observe(step.action, step.observation)


def test_the_same_seed_gives_the_same_demonstration(train, prior):
    game = max(train[:100], key=lambda game: len(game.names))
    make = lambda seed, **knobs: demonstrate(AlfworldEnv(), game, Expert(prior, np.random.default_rng(seed), knobs.get("order_noise", 0)),
                                             np.random.default_rng(seed), knobs.get("mistakes", 0))
    assert make(0) == make(1)  # no chance without the knobs
    for knobs in ({"mistakes": 0.3}, {"order_noise": 2.0}):
        assert make(0, **knobs) == make(0, **knobs)
        assert len({str(make(seed, **knobs)) for seed in range(5)}) > 1


def test_the_cap_ends_a_demonstration(train, prior):
    demo = demonstrate(AlfworldEnv(), train[0], Expert(prior), np.random.default_rng(0), max_steps=2)
    assert len(demo.steps) == 2 and not demo.won


@pytest.mark.parametrize("flags", (["--mistakes", "2"], ["--mistakes", "some"], ["--games", "chess"], ["--data", "/nowhere"]))
def test_bad_flags_are_told_in_one_line(flags):
    run = subprocess.run([sys.executable, "expert.py", *flags], cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
