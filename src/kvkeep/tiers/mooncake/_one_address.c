/* Keeps the listening sockets of one process to one address, whatever its libraries ask for.
 *
 * Mooncake's library binds the ports of its client to every address of the host and can't be told
 * otherwise (docs/decisions/0022-mooncake-listens-on-one-address.md). The process that holds it
 * (kvkeep.tiers.mooncake.program) is started with this file in LD_PRELOAD and an address in
 * KVKEEP_LISTENING_ADDRESS; here bind() and listen() stand in front of the C library's:
 *
 *   - bind() to every address binds to that one;
 *   - listen() on a socket that is bound to every address all the same fails, and one that was
 *     never bound, which the kernel would give every address, is bound to that one first.
 *
 * An IPv4 socket where the address is of IPv6 gets the loopback address. Without an address that can
 * be read both fail: nothing is ever wider than was said.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#define VARIABLE "KVKEEP_LISTENING_ADDRESS"
/* ::ffff:0:0/96, in which an IPv6 socket that serves both sees IPv4. */
#define MAPPED_BYTES 12
static const unsigned char mapped_prefix[MAPPED_BYTES] = {[10] = 0xff, [11] = 0xff};

typedef union {
    struct sockaddr any;
    struct sockaddr_in v4;
    struct sockaddr_in6 v6;
} address_t; /* the port lies at the same place in both families */

static struct in6_addr own; /* IPv4 as a mapped address */
static bool has_own;

__attribute__((constructor)) static void read_address(void)
{
    const char *text = getenv(VARIABLE);
    if (text == NULL)
        return;
    memcpy(own.s6_addr, mapped_prefix, MAPPED_BYTES);
    has_own = inet_pton(AF_INET, text, own.s6_addr + MAPPED_BYTES) == 1 ||
              inet_pton(AF_INET6, text, &own) == 1;
}

static address_t copy_of(const struct sockaddr *address, socklen_t length)
{
    address_t copy;
    memset(&copy, 0, sizeof copy);
    if (address != NULL)
        memcpy(&copy, address, length < sizeof copy ? length : sizeof copy);
    return copy;
}

/* Also the mapped form of 0.0.0.0. */
static bool is_every_address(const address_t *address)
{
    const struct in6_addr *v6 = &address->v6.sin6_addr;
    if (address->any.sa_family == AF_INET)
        return address->v4.sin_addr.s_addr == htonl(INADDR_ANY);
    return address->any.sa_family == AF_INET6 &&
           (IN6_IS_ADDR_UNSPECIFIED(v6) ||
            (IN6_IS_ADDR_V4MAPPED(v6) && v6->s6_addr32[3] == htonl(INADDR_ANY)));
}

/* Put the own address in the place of every one; the port stays. An IPv6 socket that serves IPv6
 * only refuses a mapped address itself. */
static void narrow(address_t *address)
{
    if (address->any.sa_family == AF_INET6)
        address->v6.sin6_addr = own;
    else if (IN6_IS_ADDR_V4MAPPED(&own))
        address->v4.sin_addr.s_addr = own.s6_addr32[3];
    else
        address->v4.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
}

static int refuse(void)
{
    errno = EADDRNOTAVAIL;
    return -1;
}

int bind(int fd, const struct sockaddr *address, socklen_t length)
{
    int (*next)(int, const struct sockaddr *, socklen_t) =
        (int (*)(int, const struct sockaddr *, socklen_t))dlsym(RTLD_NEXT, "bind");
    if (next == NULL)
        return refuse();
    address_t asked = copy_of(address, length);
    if (!is_every_address(&asked))
        return next(fd, address, length);
    if (!has_own)
        return refuse();
    narrow(&asked);
    return next(fd, &asked.any, length);
}

int listen(int fd, int backlog)
{
    int (*next)(int, int) = (int (*)(int, int))dlsym(RTLD_NEXT, "listen");
    if (next == NULL)
        return refuse();
    address_t bound = copy_of(NULL, 0);
    socklen_t length = sizeof bound;
    if (getsockname(fd, &bound.any, &length) == 0 && is_every_address(&bound)) {
        if (bound.v4.sin_port != 0)
            return refuse();
        if (bind(fd, &bound.any, length) != 0)
            return -1;
    }
    return next(fd, backlog);
}
