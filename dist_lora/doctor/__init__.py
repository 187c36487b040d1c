"""What is wrong with these machines (versions, devices, disk, network, clocks), and how fast they are."""
