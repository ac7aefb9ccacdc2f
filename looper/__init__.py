"""The library behind the stages: data, models, generation, training, evaluation, report."""
