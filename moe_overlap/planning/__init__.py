"""Which schedule is fastest: integers and seconds in, a schedule out. Nothing here touches a tensor or a device."""
