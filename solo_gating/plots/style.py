"""The style of all pictures: Okabe and Ito's colour-blind safe palette."""

DENSE, GATED, NEUTRAL = "#0072B2", "#D55E00", "#555555"
