"""The Knative Pod Autoscaler without I/O: settings, statistics, windows, decision, and what the reconciler makes of it.

    stats.py        requests in and out -> averages of one reporting period
    windows.py      one-second buckets -> averages over the stable and the panic window
    kpa.py          averages -> how many pods (the decider)
    scale.py        decision -> replicas to have now, and whether the activator is in the path (the reconciler)
    config.py       config-autoscaler and a revision's annotations -> the ScalerSpec that the above follow
    annotations.py  what may stand in the annotations
    durations.py, values.py   Go's notations

Time is an argument everywhere: Unix seconds.
"""
