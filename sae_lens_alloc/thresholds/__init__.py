"""
Thresholds that bring a trained SAE to a wanted number of features per token, its L0.

Who wants it: `calibration` the SAE that has just been trained, `recalibration` a saved SAE on
other text or at another L0, `operating_point` the SAEs that are compared at equal L0. How:
`factor` moves all thresholds by one factor, `densities` moves all densities by one factor, and
`jumprelu_form` gives thresholds to an SAE of another architecture.
"""
