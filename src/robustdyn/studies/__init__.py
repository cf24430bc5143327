"""The studies, a module each; ``robustdyn.studies.shared.study.names`` lists them."""
