"""The parts of docs/evidence/cifar10.py: data, network, training, records."""
