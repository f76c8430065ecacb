"""From files of counts to a store, by several processes, through any number of kills."""
