// What every reference kernel starts from.
#pragma once
#include <math.h>

#include "core/check.h"
#include "core/element.h"
#include "core/half.h"
#include "core/op.h"
