"""The trainer: one loop for every objective.

    config.py       frozen, validated run configuration; the only reader of the command line's ConfigDict
    objective.py    what a training objective gives to the loop, and the table of objectives by name
    loop.py         the loop: jitted step, resume, signals, progress
    optim.py        AdamW and Muon, schedules, clipping
    ema.py          exponential moving average of the parameters
    checkpoint.py   Orbax: parameters, EMA, optimizer and data position in one atomic step folder
    metrics.py      JSONL and TensorBoard scalars, sample videos
    corruption.py   history corruption against drift
    flow.py         what the stages share: the context of a sample, the loss of a batch, the objective
    stage1.py       the stage-1 objective (flow matching at full resolution)
    stage2.py       the stage-2 objective (flow matching on a pyramid of resolutions)
    stage3_ode.py   the first objective of stage 3 (regression of a teacher's trajectories in few steps)
    weights.py      which parameters are trained: all, or low-rank adapters beside a fixed base
    presets.py      sizes, and what the configurations of the original's runs have in common
    validation.py   sample videos during training, and the export of a trained transformer
    validation_loss.py  the loss on fixed examples

Every random number of a step is derived from (seed, step), and the position in the data is part of the checkpoint,
so a run that is killed and resumed computes bitwise the same losses as one that was not.
"""
