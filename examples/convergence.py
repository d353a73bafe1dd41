"""How fast laws converge in time, and particles in number: W₂ rate and chaos slope of mean-field OU, with intervals."""

import matplotlib.pyplot as plt
import xarray as xr

import mfsde
from mfsde.analysis import chaos, plots, rates, wasserstein
from mfsde.scenarios import MeanFieldOU

ou = MeanFieldOU(kappa=1.0, coupling=0.5, sigma=0.7, initial_variance=0.49 / 3)
settings = {"n_replicas": 20, "horizon": 3.0, "dt": 0.005, "seed": 0, "save_every": 30}
sizes = [25, 50, 100, 200, 400]
runs = [mfsde.simulate(ou, n_particles=n, **settings) for n in sizes]
copies = [mfsde.simulate(mfsde.decoupled(ou, ou.limit), n_particles=n, **settings) for n in sizes]
w2 = wasserstein.to_law(runs[-1], mfsde.Gaussian([0.0], [[0.49 / 3]]))  # to the invariant law, with its floor
errors = chaos.table(runs, copies)  # E sup_t |X^{i,N} - X̄^i|²: the same noise, particle by particle
decay, slope = rates.exponential(w2), rates.power(errors)
print(f"W₂ decays like exp(-λt), λ = {decay}\nthe coupling error falls like N^p, p = {slope}")
data = xr.Dataset({"w2": w2.assign_attrs(decay.attributes()), "chaos": errors.assign_attrs(slope.attributes())})
data.to_zarr("convergence.zarr", mode="w", consolidated=False)
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
plots.decay(w2, decay, ax=left), plots.chaos_slope(errors, slope, ax=right)
figure.savefig("convergence.png")
