"""Which schedule is fastest: integers and seconds in, a schedule out; no tensor, no device."""
