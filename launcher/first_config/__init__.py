"""`launcher init`: a first config from a model, data, a cluster and a number of GPUs, with a reason beside each value.

`answers` are what the user says, `survey` is what model and data say, `text` is the file, and `write` makes sure that
`submit` takes it.
"""
