"""`verl-plugins study`: variants times seeds, trained and compared at an equal budget, differences paired by seed."""
