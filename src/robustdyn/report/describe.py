"""What was run, in words a reader takes in at once, from configurations of any layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from robustdyn.records.labels import flatten, format_value
from robustdyn.records.reader import Run
from robustdyn.records.run_directory import RunDirectory

MOST_VALUES = 12  # that are listed one by one
_NORMS = {"linf": "l∞", "l2": "l2"}
_SECTIONS = {  # section -> heading and the settings worth a reader's first glance, in order
    "data": ("data", ("batch_size",)),
    "model": ("model", ("width", "blocks", "strides")),
    "attack": ("attack", ()),
    "objective": ("objective", ("beta", "label_smoothing")),
    "perturbation": ("weight perturbation", ("gamma", "rho", "warmup_epochs")),
    "added_noise": ("added gradient noise", ("factor",)),
    "curvature_penalty": ("curvature penalty", ("strength", "examples")),
    "regularizer": ("regulariser", ("l1", "weight_decay_on")),
    "optimizer": ("optimiser", ("lr", "momentum", "weight_decay", "nesterov", "betas")),
    "schedule": (
        "schedule",
        (
            "milestones",
            "start_epoch",
            "factor",
            "factors",
            "decays",
            "quantity",
            "threshold",
            "interval",
            "beta_per_example",
        ),
    ),
    "averaging": ("weight averaging", ("decay", "start_epoch")),
    "stopping": ("early stopping", ("monitor", "patience")),
}


def what_was_run(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Rows of (topic, description); settings that differ between runs are joined by ``|``."""
    rows = [
        (heading, [_section(run, name, keys) for run in runs]) for name, (heading, keys) in _SECTIONS.items()
    ]
    rows.insert(1, ("augmentation", [_augmentation(run.config.get("data")) for run in runs]))
    rows.append(("execution", [_execution(run.config) for run in runs]))
    rows.append(("measured", [_measured(run.config.get("measure")) for run in runs]))
    rows.append(("epochs", [_value(run.config, "trainer", "max_epochs") for run in runs]))
    rows.append(("seeds", [format_value(run.config["seed"]) if "seed" in run.config else "" for run in runs]))
    told = [(heading, joined(texts, ", " if heading == "seeds" else " | ")) for heading, texts in rows]
    return [(heading, text) for heading, text in told if text]


def environment(run: Run) -> dict[str, str]:
    """Versions, hardware and revision the run recorded, flat; empty when it recorded none."""
    facts = RunDirectory(run.path).read_environment() or {}
    return {key.removeprefix("packages."): format_value(value) for key, value in flatten(facts).items()}


def provenance(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Rows of (fact, its distinct values over the runs)."""
    facts = [environment(run) for run in runs]
    keys = dict.fromkeys(key for fact in facts for key in fact)
    return [(key.replace("_", " "), joined([fact.get(key, "") for fact in facts], " | ")) for key in keys]


def _section(run: Run, name: str, keys: Sequence[str]) -> str:
    """One section of one run's configuration: what was picked, then the settings of note it has."""
    section = run.config.get(name)
    if not isinstance(section, Mapping):
        return "" if section is None else format_value(section)
    if name == "attack" and "eps_255" in section:
        return _attack(section)
    images = _images(section) if name == "data" else []
    target = str(section.get("_target_", "")).rpartition(".")[2]
    picked = str(run.choices.get(name, section.get("name", target)))
    said = images + [
        f"{key.replace('_', ' ')} {format_value(section[key])}"
        for key in keys
        if section.get(key) is not None
    ]
    return f"{picked}: {', '.join(said)}" if picked and said else picked or ", ".join(said)


def _attack(section: Mapping[str, Any]) -> str:
    """``PGD-10, l∞, ε = 8/255, step 2/255``."""
    norm = str(section.get("norm", ""))
    parts = [f"PGD-{section['steps']}" if "steps" in section else "PGD", _NORMS.get(norm, norm)]
    parts.append(f"ε = {format_value(section['eps_255'])}/255")
    if "step_255" in section:
        parts.append(f"step {format_value(section['step_255'])}/255")
    trained = section.get("train")
    if isinstance(trained, Mapping) and trained.get("projection") == "range":
        steps = "1 step" if trained.get("steps") == 1 else f"{trained.get('steps', '?')} steps"
        start = format_value(trained.get("relative_start", "?"))
        parts.append(f"trained with {steps} from {start} ε, not projected onto the ball")
    elif isinstance(trained, Mapping) and trained.get("steps", section.get("steps")) != section.get("steps"):
        parts.append(f"trained with PGD-{trained['steps']}")
    tested = section.get("evaluation")
    if isinstance(tested, Mapping) and tested.get("steps", section.get("steps")) != section.get("steps"):
        parts.append(f"tested with PGD-{tested['steps']}")
    return ", ".join(part for part in parts if part)


def _images(section: Mapping[str, Any]) -> list[str]:
    """``all training images``, ``540 test images``, ``10 classes``: what there is, wherever its files lie."""
    said = []
    for part, name in (("train", "training"), ("validation", "validation"), ("test", "test")):
        key = f"{part}_size"
        if key not in section or (part == "validation" and not section[key]):
            continue  # none held out
        size = section[key]
        said.append(f"all {name} images" if size is None else f"{format_value(size)} {name} images")
    if section.get("test_from_train"):
        said.append("tested on images of the training file")
    if section.get("partial"):
        said.append("from an excerpt of the files")
    if "num_classes" in section:
        shape = [section.get(key) for key in ("channels", "image_size", "image_size")]
        each = "×".join(map(format_value, shape)) if None not in shape else ""
        said.append(f"{format_value(section['num_classes'])} classes{f' of {each}' if each else ''}")
    return said


def _augmentation(section: object) -> str:
    """``crop padding 4 (reflect), flip``; ``none`` where nothing is changed."""
    if not isinstance(section, Mapping) or not isinstance(section.get("augment"), Mapping):
        return ""
    augment, said = section["augment"], []
    if augment.get("crop_padding"):
        said.append(
            f"crop padding {format_value(augment['crop_padding'])} ({augment.get('padding_mode', '?')})"
        )
    if augment.get("flip"):
        said.append("flip")
    if augment.get("cutout"):
        said.append(f"cutout {format_value(augment['cutout'])}")
    if section.get("mixup"):
        said.append(f"mixup {format_value(section['mixup'])}")
    return ", ".join(said) or "none"


def _execution(config: Mapping[str, Any]) -> str:
    """``32-true, not compiled, channels last, deterministic``: as far as the configuration says."""
    section, trainer = (
        part if isinstance(part, Mapping) else {} for part in (config.get("execution"), config.get("trainer"))
    )
    said = [f"precision {format_value(trainer['precision'])}"] if "precision" in trainer else []
    if "compile" in section:
        mode = format_value(section["compile"])
        said.append("not compiled" if mode == "none" else f"compiled ({mode})")
    if section.get("channels_last"):
        said.append("channels last")
    if config.get("deterministic"):
        said.append("deterministic")
    if "devices" in trainer and (trainer["devices"] != 1 or trainer.get("num_nodes", 1) != 1):
        said.append(f"devices {format_value(trainer['devices'])}")
        said += [f"nodes {format_value(n)}" for n in [trainer.get("num_nodes", 1)] if n != 1]
        said += [format_value(trainer["strategy"])] if trainer.get("strategy") else []
    return ", ".join(said)


def _measured(section: object) -> str:
    """``every 5, on 256 training examples``."""
    if not isinstance(section, Mapping) or not section.get("epochs"):
        return ""
    averaged = ", with averaged weights" if section.get("weights") == "averaged" else ""
    return f"{format_value(section['epochs'])}, on {section.get('examples', '?')} training examples{averaged}"


def _value(config: Mapping[str, Any], section: str, key: str) -> str:
    inner = config.get(section)
    return format_value(inner[key]) if isinstance(inner, Mapping) and key in inner else ""


def joined(texts: Sequence[str], separator: str) -> str:
    """The distinct texts side by side; of many the first ones, and how many there are."""
    found = [text for text in dict.fromkeys(texts) if text]
    more = [f"… ({len(found)} in all)"] if len(found) > MOST_VALUES else []
    return separator.join([*found[:MOST_VALUES], *more])
