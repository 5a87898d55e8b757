"""The parts of examples/cifar10.py: data, network, training, records, report."""
