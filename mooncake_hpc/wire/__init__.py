"""All that must stay equal to Mooncake: descriptors, frames, handshakes, orders. A change here breaks compatibility."""
