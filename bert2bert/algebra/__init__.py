"""The numbers of a growth: named axes, maps, plans, states, and their arithmetic. Knows no model and no file."""
