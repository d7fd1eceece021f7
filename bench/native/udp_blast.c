/*
 * udp_blast FROM:PORT TO:PORT SIZE SECONDS RATE JOINED CPU
 *
 * See blast.h; RATE 0 is as fast as it goes.
 */
#include "blast.h"

int main(int argc, char **argv)
{
    if (argc != 8) {
        fprintf(stderr, "usage: udp_blast FROM:PORT TO:PORT SIZE SECONDS RATE JOINED CPU\n");
        return 2;
    }
    start(atoi(argv[7]));
    /* One nanosecond of slack: a late wake-up would show up as a burst that nobody asked for. */
    prctl(PR_SET_TIMERSLACK, 1);
    blast(udp_socket(argv[1], 8 << 20), address(argv[2]), (size_t)atoi(argv[3]), atof(argv[4]), atof(argv[5]),
          atoi(argv[6]));
    return 0;
}
