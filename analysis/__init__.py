"""Analysis: datasets and laws in, datasets or numbers out. Nothing here simulates.

What one calls: `wasserstein` (distances), `unbalanced` (measures of other mass), `rates`, `chaos` (particles against
their limit), `control_variates` (fewer replicas for one error), `entropy`, `theory` and `contraction` (theorems as
checks), `plots`, `overview` (all of it for one run).

What they stand on:
    runs as arrays, errors: `particles`, `labels`, `replicas`
    transport: `ground`, `line`, `bures`, `laws`, `floor`, `sinkhorn`
    entropy: `neighbours`, `log_density`, `normalisation`, `quadrature`, `annealing`, `score_matching`
    theorems: `check`, `dynamics` (which equation a run follows), `gibbs`, `free_energy`
    pictures: `axes`, `curves`, `clouds`, `limits`, `histograms`, `animations`, `fields`
"""
