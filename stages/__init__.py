"""One thin module a pipeline stage: read the params, load, one library call, save. Run one with `python -m stages.NAME`."""
