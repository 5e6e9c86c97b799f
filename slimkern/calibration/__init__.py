"""Calibration: what a few thousand inputs tell about each layer, and what follows from it.

``replay`` and ``walk`` run a model group by group over stored activations, ``moments`` adds up what
is seen, ``obs`` decides what goes, ``solve`` repairs what stays.
"""
