"""Logs in the format of the public scripts, and tables of epochs, with numbers of our own."""

ARGUMENTS = {
    "attack": "'pgd'",
    "attack_iters": "10",
    "batch_size": "128",
    "cutout": "False",
    "cutout_len": "None",
    "data_dir": "'../cifar-data'",
    "epochs": "200",
    "epsilon": "8",
    "fgsm_alpha": "1",
    "fname": "'experiments/cifar10_standard/preactresnet18'",
    "l1": "0",
    "l2": "0",
    "lr_max": "0.1",
    "lr_schedule": "'piecewise'",
    "mixup": "False",
    "mixup_alpha": "None",
    "model": "'PreActResNet18'",
    "norm": "'l_inf'",
    "pgd_alpha": "2",
    "seed": "0",
    "width_factor": "10",
}
AWP_ARGUMENTS = {"attack_iters_test": "20", "awp_iter": "1", "awp_size": "0.01", "awp_warmup": "5"}
HEADER = "Epoch|Train Time|Test Time|LR|Train Loss|Train Acc|Train Robust Loss|Train Robust Acc|Test Loss"
HEADER = f"{HEADER}|Test Acc|Test Robust Loss|Test Robust Acc".replace("|", " \t ")
TRAIN, TEST = ("1.5", "0.4", "1.9", "0.3"), ("1.4", "0.5", "1.8", "0.25")


def stamped(text):
    return f"[2020/01/10 19:31:07] - {text}\n"


def epoch_line(epoch, rate="0.1000", train=TRAIN, test=TEST):
    return stamped(" \t ".join([str(epoch), "170.5", "34.0", str(rate), *train, *test]))


def log_text(epochs=3, first=0, lr=0.1, arguments=()):
    """A start of the script: arguments, names of the columns, epochs up to ``epochs``."""
    given = ", ".join(f"{key}={value}" for key, value in (ARGUMENTS | dict(arguments)).items())
    lines = [stamped(f"Namespace({given})")]
    if first:
        lines.append(stamped(f"Resuming at epoch {first}"))
    lines.append(stamped(HEADER))
    return "".join([*lines, *(epoch_line(epoch, lr) for epoch in range(first, epochs))])


def write_log(folder, **options):
    folder.mkdir(parents=True)
    (folder / "output.log").write_text(log_text(**options))
    return folder / "output.log"


def table_text(run, errors, rates=None):
    """A table of one run's robust test errors; training errors are two thirds of them."""
    rates = rates or [0.1] * len(errors)
    rows = [
        f"{run},{epoch},{rate},{error},{error / 1.5},{4 * error},{3 * error}"
        for epoch, (error, rate) in enumerate(zip(errors, rates, strict=True))
    ]
    names = "run,epoch,lr,test_robust_error,train_robust_error,test_robust_loss,train_robust_loss"
    return "\n".join([names, *rows, ""])
