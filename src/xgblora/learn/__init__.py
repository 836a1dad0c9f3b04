"""How a step is made: losses and rewards, gradient estimates, fitted boosters, merge schedules, evaluation."""
