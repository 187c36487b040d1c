"""What is wrong on these machines: versions, devices, disk, network, clocks; and how fast they are."""
