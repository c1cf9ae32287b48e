"""The trainer: one loop for every objective.

    config.py       frozen, validated run configuration; the only reader of the command line's ConfigDict
    objective.py    what a training objective gives to the loop, and the table of objectives by name
    loop.py         the loop: jitted step, resume, signals, progress
    optim.py        AdamW and Muon, schedules, clipping
    ema.py          exponential moving average of the parameters
    checkpoint.py   Orbax: parameters, EMA, optimizer and data position in one atomic step folder
    metrics.py      JSONL and TensorBoard scalars, sample videos
    corruption.py   history corruption against drift
    stage1.py       the stage-1 objective (flow matching with history injection)
    validation.py   sample videos during training, and the export of a trained transformer

Every random number of a step is derived from (seed, step), and the position in the data is part of the checkpoint,
so a run that is killed and resumed computes bitwise the same losses as one that was not.
"""
