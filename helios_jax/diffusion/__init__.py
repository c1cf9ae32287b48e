"""The mathematics of sampling that is not a network: schedules, solvers, pyramid, guidance, history and noise.

Everything here is a pure function or a frozen table. Schedules and solver coefficients are computed on the host in
NumPy float64 (jax runs without x64) and become float32 only as the finished coefficients of a step; what runs on the
device is float32 and channel-last [B, T, h, w, C].

  schedules  stage constants, sigmas and timesteps (HeliosScheduler, HeliosDMDScheduler)
  solvers    UniPC, Euler and DMD as tables of linear coefficients and one jittable step
  pyramid    down, up, block noise and the jump from one stage to the next
  few_step   the distilled student's grids and its step
  guidance   classifier-free guidance, CFG-Zero* and zero init
  history    the 19 history frames, their index vectors, the anchor frame
  noise      the one source of random numbers of a run
"""
