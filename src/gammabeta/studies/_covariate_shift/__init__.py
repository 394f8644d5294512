"""What the experiment on covariate shift trains, looks at and compares."""
